# SPDX-License-Identifier: Apache-2.0
"""Bytes go both ways, in order, all of them, and no more of them are held than need be."""

import contextlib
import os
import random
import resource
import selectors
import socket
import struct
import threading
import time
from collections.abc import Iterator
from typing import cast

import pytest

from rekindle.cell import Cell
from rekindle.engine import Endpoint
from rekindle.errors import PortError
from restore.serve.address import bind, listen
from restore.serve.forward import Forwarder
from tests.conftest import wait_for

NOISE = random.Random(0).randbytes(3 << 20)
SECONDS = 20.0
HELD_BYTES = 256 << 10


class Here:
    """Stands in for a cell: its sockets are of our own network."""

    def __init__(self, buffer_bytes: int | None = None) -> None:
        self.buffer_bytes = buffer_bytes
        self.error: OSError | None = None

    def socket(self, family: socket.AddressFamily) -> socket.socket:
        if self.error:
            raise self.error
        sock = socket.socket(family, socket.SOCK_STREAM)
        shrink(sock, self.buffer_bytes)
        return sock


def shrink(sock: socket.socket, buffer_bytes: int | None) -> None:
    if buffer_bytes:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer_bytes)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)


class Setting:
    """A server that a test plays, a forwarder before it, and a loop that runs it."""

    def __init__(self, host: str = "127.0.0.1", buffer_bytes: int | None = None) -> None:
        self._buffer_bytes = buffer_bytes
        self.server = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        shrink(self.server, buffer_bytes)
        self.server.settimeout(SECONDS)
        self.server.bind((host, 0))
        self.server.listen(1000)
        self.cell = Here(buffer_bytes)
        self.turns = 0
        self._selector = selectors.DefaultSelector()
        target = Endpoint(host=host, port=self.server.getsockname()[1])
        self._forwarder = Forwarder(self._selector, cast("Cell", self.cell))
        published = bind(Endpoint(host=host, port=0))
        shrink(published, buffer_bytes)
        self.address = published.getsockname()
        listen(published, target)
        self._forwarder.accept_from(published, target)
        self._wake, self._woken = socket.socketpair()
        self._selector.register(self._woken, selectors.EVENT_READ, None)
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._loop)
        self._thread.start()

    def _loop(self) -> None:
        try:
            while True:
                for key, mask in self._selector.select():
                    if key.data is None:
                        return
                    self.turns += 1
                    key.data(mask)
        except BaseException as error:
            self._failure = error

    def connect(self) -> socket.socket:
        family = socket.AF_INET6 if ":" in self.address[0] else socket.AF_INET
        client = socket.socket(family)
        shrink(client, self._buffer_bytes)
        client.settimeout(SECONDS)
        client.connect(self.address)
        return client

    def pair(self) -> tuple[socket.socket, socket.socket]:
        """A client, and the connection that the server got for it."""
        client = self.connect()
        server, _ = self.server.accept()
        server.settimeout(SECONDS)
        return client, server

    @property
    def watched(self) -> int:
        return len(self._selector.get_map())

    def drain(self) -> None:
        self._wake.close()
        self._thread.join(SECONDS)
        self._forwarder.drain()

    def close(self) -> None:
        self._wake.close()
        self._thread.join(SECONDS)
        self._forwarder.close()
        assert self.watched == 1
        self._selector.close()
        self._woken.close()
        self.server.close()
        assert self._failure is None
        assert not self._thread.is_alive()


@pytest.fixture
def setting() -> Iterator[Setting]:
    with contextlib.closing(Setting()) as made:
        yield made


@pytest.fixture
def narrow() -> Iterator[Setting]:
    """The same with little room in the kernel, so that what is held is held by the forwarder."""
    with contextlib.closing(Setting(buffer_bytes=8192)) as made:
        yield made


def read_all(sock: socket.socket) -> bytes:
    content = bytearray()
    while piece := sock.recv(1 << 16):
        content += piece
    return bytes(content)


def read_exactly(sock: socket.socket, count: int) -> bytes:
    content = bytearray()
    while len(content) < count and (piece := sock.recv(min(1 << 16, count - len(content)))):
        content += piece
    return bytes(content)


def sending(sock: socket.socket, content: bytes) -> threading.Thread:
    """Sends in the background, and then ends the stream."""

    def send() -> None:
        sock.sendall(content)
        sock.shutdown(socket.SHUT_WR)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


def reset(sock: socket.socket) -> None:
    """Ends a connection at once, without a word."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def ended(sock: socket.socket) -> bool:
    """Whether the other side ended the connection, one way or another."""
    try:
        return sock.recv(1) == b""
    except ConnectionError:
        return True


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_request_and_its_answer(setting: Setting) -> None:
    client, server = setting.pair()
    with client, server:
        client.sendall(b"question")
        assert server.recv(100) == b"question"
        server.sendall(b"answer")
        assert client.recv(100) == b"answer"


def test_much_goes_both_ways_at_once(setting: Setting) -> None:
    client, server = setting.pair()
    with client, server:
        threads = [sending(client, NOISE), sending(server, NOISE[::-1])]
        got: list[bytes] = []
        reader = threading.Thread(target=lambda: got.append(read_all(server)))
        reader.start()
        assert read_all(client) == NOISE[::-1]
        for thread in (*threads, reader):
            thread.join(SECONDS)
        assert got == [NOISE]


def test_an_echo_of_the_stream_comes_back(setting: Setting) -> None:
    client, server = setting.pair()
    with client, server:
        sender = sending(client, NOISE)

        def echo() -> None:
            while piece := server.recv(4096):
                server.sendall(piece)
            server.shutdown(socket.SHUT_WR)

        echoing = threading.Thread(target=echo)
        echoing.start()
        assert read_all(client) == NOISE
        sender.join(SECONDS)
        echoing.join(SECONDS)


def test_a_client_that_has_said_all_gets_its_answer(setting: Setting) -> None:
    client, server = setting.pair()
    with client, server:
        client.sendall(b"all")
        client.shutdown(socket.SHUT_WR)
        assert read_all(server) == b"all"
        server.sendall(b"answer")
        server.close()
        assert read_all(client) == b"answer"


def test_a_server_that_has_said_all_still_hears(setting: Setting) -> None:
    client, server = setting.pair()
    with client, server:
        server.sendall(b"hello")
        server.shutdown(socket.SHUT_WR)
        assert read_all(client) == b"hello"
        client.sendall(b"still here")
        assert server.recv(100) == b"still here"
        client.close()
        assert read_all(server) == b""


def test_what_is_sent_before_the_end_arrives_before_it(narrow: Setting) -> None:
    client, server = narrow.pair()
    with client, server:
        content = NOISE[:200_000]
        sender = sending(client, content)
        time.sleep(0.1)  # all of it is on its way, and so is the end
        assert read_all(server) == content
        sender.join(SECONDS)


def test_a_connection_is_forgotten_when_both_have_ended(setting: Setting) -> None:
    before, idle = open_files(), setting.watched
    for _ in range(10):
        client, server = setting.pair()
        client.sendall(b"x")
        server.recv(1)
        client.close()
        server.close()
    wait_for(lambda: (open_files(), setting.watched) == (before, idle), SECONDS)


def fill(sock: socket.socket) -> int:
    """Sends until nobody takes more; returns how much was taken."""
    sock.settimeout(0.3)
    sent = 0
    with contextlib.suppress(TimeoutError):
        while sent < len(NOISE):
            sent += sock.send(NOISE[sent : sent + 4096])
    sock.settimeout(SECONDS)
    return sent


@pytest.mark.parametrize("direction", ["to the server", "to the client"])
def test_a_slow_reader_holds_its_writer_back(narrow: Setting, direction: str) -> None:
    client, server = narrow.pair()
    writer, reader = (client, server) if direction == "to the server" else (server, client)
    with client, server:
        sent = fill(writer)
        assert HELD_BYTES <= sent < HELD_BYTES + (128 << 10)
        assert fill(writer) == 0
        reader.sendall(b"the other way is free")
        assert writer.recv(100) == b"the other way is free"
        got = read_exactly(reader, sent)
        assert got == NOISE[:sent]
        rest = sending(writer, NOISE[sent:])
        assert read_all(reader) == NOISE[sent:]
        rest.join(SECONDS)


def test_a_blocked_connection_holds_up_no_other(narrow: Setting) -> None:
    slow, slow_server = narrow.pair()
    fill(slow)
    client, server = narrow.pair()
    with slow, slow_server, client, server:
        client.sendall(b"question")
        assert server.recv(100) == b"question"


def test_who_waits_takes_no_time(narrow: Setting) -> None:
    client, server = narrow.pair()
    blocked, blocked_server = narrow.pair()
    half, half_server = narrow.pair()
    with client, server, blocked, blocked_server, half, half_server:
        fill(blocked)
        half.shutdown(socket.SHUT_WR)
        assert half_server.recv(1) == b""
        time.sleep(0.1)
        before = narrow.turns
        time.sleep(0.3)
        assert narrow.turns - before <= 2


def test_a_refused_connection_ends_the_client(setting: Setting) -> None:
    address = setting.server.getsockname()
    setting.server.close()
    idle = setting.watched
    for _ in range(5):
        with setting.connect() as client:
            assert ended(client)
    wait_for(lambda: setting.watched == idle, SECONDS)
    setting.server = socket.socket()
    setting.server.settimeout(SECONDS)
    setting.server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    setting.server.bind(address)
    setting.server.listen()
    client, server = setting.pair()  # and the next may get through
    with client, server:
        client.sendall(b"x")
        assert server.recv(1) == b"x"


def test_a_cell_without_a_socket_to_give_ends_the_client(setting: Setting) -> None:
    setting.cell.error = OSError("no more")
    with setting.connect() as client:
        assert ended(client)
    setting.cell.error = None
    client, server = setting.pair()
    with client, server:
        client.sendall(b"x")
        assert server.recv(1) == b"x"


def test_a_lack_that_is_over_keeps_nobody_out(setting: Setting) -> None:
    client, server = setting.pair()
    with client, server:
        setting.cell.error = OSError("no more")
        with setting.connect() as refused:
            assert ended(refused)
        setting.cell.error = None
        setting.server.settimeout(1)
        for end in setting.pair():
            end.close()


def test_many_connections_do_not_mix(setting: Setting) -> None:
    with contextlib.ExitStack() as stack:
        pairs = []
        for number in range(100):
            client = stack.enter_context(setting.connect())
            client.sendall(b"%03d" % number)
            server = stack.enter_context(setting.server.accept()[0])
            server.settimeout(SECONDS)
            pairs.append((client, server))
        for number, (_, server) in enumerate(pairs):
            assert read_exactly(server, 3) == b"%03d" % number
            server.sendall(b"answer %03d" % number)
        for number, (client, _) in reversed(list(enumerate(pairs))):
            assert read_exactly(client, 10) == b"answer %03d" % number


def test_a_client_that_is_gone_ends_the_servers_stream(setting: Setting) -> None:
    before = open_files()
    client, server = setting.pair()
    server.sendall(b"x")
    assert client.recv(1) == b"x"
    reset(client)
    with server, contextlib.suppress(ConnectionError):
        while True:  # a stream of tokens that nobody reads any more
            server.sendall(NOISE[:65536])
    wait_for(lambda: open_files() == before, SECONDS)


def test_a_client_that_is_gone_ends_an_idle_server(setting: Setting) -> None:
    client, server = setting.pair()
    reset(client)
    with server:
        assert ended(server)


def test_a_client_that_goes_while_it_is_connected_does_no_harm(setting: Setting) -> None:
    before = open_files()
    for _ in range(20):
        reset(setting.connect())
    client, server = setting.pair()
    while True:  # the connections of those that went may come first
        try:
            server.settimeout(0.2)
            client.sendall(b"x")
            assert server.recv(1) == b"x"
            break
        except (OSError, AssertionError):
            server.close()
            server, _ = setting.server.accept()
    client.close()
    server.close()
    setting.server.settimeout(0.1)
    with contextlib.suppress(TimeoutError):
        while True:
            setting.server.accept()[0].close()
    wait_for(lambda: open_files() == before, SECONDS)


def test_a_server_that_dies_ends_the_client(setting: Setting) -> None:
    client, server = setting.pair()
    reset(server)
    with client:
        assert ended(client)


def test_what_a_server_sent_before_it_died_arrives(narrow: Setting) -> None:
    client, server = narrow.pair()
    server.sendall(NOISE[:65536])
    time.sleep(0.1)  # most of it is held, as the client reads nothing
    reset(server)
    with client:
        assert read_all(client) == NOISE[:65536]


def test_what_a_server_answered_arrives_though_it_no_longer_hears(setting: Setting) -> None:
    client, server = setting.pair()
    with client, server:
        server.sendall(b"413")
        reset(server)
        client.sendall(b"x")
        assert read_exactly(client, 3) == b"413"


def test_draining_delivers_what_a_slow_client_has_not_read(narrow: Setting) -> None:
    client, server = narrow.pair()
    idle, idle_server = narrow.pair()
    server.sendall(NOISE[:65536])
    server.close()
    idle_server.close()
    content = bytearray()

    def read_late() -> None:
        time.sleep(0.2)
        content.extend(read_all(client))

    thread = threading.Thread(target=read_late)
    thread.start()
    narrow.drain()
    thread.join(SECONDS)
    assert content == NOISE[:65536]
    with client, idle:
        assert ended(idle)
        with socket.socket() as late, pytest.raises(ConnectionRefusedError):
            late.connect(narrow.address)


def test_draining_does_not_wait_for_a_client_that_has_all(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("restore.serve.forward._DRAIN_SECONDS", None)  # for ever
    client, server = setting.pair()
    finished, finished_server = setting.pair()
    finished_server.shutdown(socket.SHUT_WR)
    assert ended(finished)
    server.close()
    finished_server.close()
    setting.drain()
    client.close()
    finished.close()


def test_draining_gives_up_on_a_client_that_takes_nothing(
    narrow: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("restore.serve.forward._DRAIN_SECONDS", 0.05)
    client, server = narrow.pair()
    server.sendall(NOISE[:65536])
    server.close()
    narrow.drain()
    with client:
        assert len(read_all(client)) < 65536


def test_closing_ends_every_connection() -> None:
    before = open_files()
    with contextlib.closing(Setting()) as setting:
        client, server = setting.pair()
        client.sendall(b"x")
        assert server.recv(1) == b"x"
    with client, server:
        assert ended(client)
        assert ended(server)
    assert open_files() == before


def test_ipv6_is_carried_too() -> None:
    try:
        setting = Setting("::1")
    except OSError:
        pytest.skip("there is no IPv6 here")
    with contextlib.closing(setting):
        client, server = setting.pair()
        with client, server:
            client.sendall(b"question")
            assert server.recv(100) == b"question"


def test_a_lack_of_descriptors_takes_no_time(setting: Setting) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with setting.connect() as first:
        setting.server.accept()[0].close()
        with socket.socket() as client:
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
            try:
                client.connect(setting.address)
                before = setting.turns
                time.sleep(0.2)
                turns = setting.turns - before
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            first.close()
    assert turns < 100


def test_a_taken_address_is_a_port_error() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(PortError, match=f"127.0.0.1:{port}") as caught:
            bind(Endpoint(host="127.0.0.1", port=port))
        assert "in use" in caught.value.cause
        assert "--publish" in caught.value.hint


@pytest.mark.parametrize("host", ["192.0.2.1", "999.1.1.1", "::zz", "2001:db8::1", ""])
def test_an_address_of_another_is_a_port_error(host: str) -> None:
    with pytest.raises(PortError):
        bind(Endpoint(host=host, port=1))


@pytest.mark.parametrize("host", ["a..b", "x" * 70, "\ud800", ":\0"])
def test_a_host_of_no_form_is_a_port_error(host: str) -> None:
    with pytest.raises(PortError):
        bind(Endpoint(host=host, port=1))


def test_an_address_is_taken_before_it_is_served() -> None:
    with bind(Endpoint(host="localhost", port=0)) as sock:
        with socket.socket() as client:
            assert client.connect_ex(sock.getsockname()) != 0
        with socket.socket() as other, pytest.raises(OSError):
            other.bind(sock.getsockname())


def test_the_faster_of_two_has_the_address() -> None:
    with bind(Endpoint(host="127.0.0.1", port=0)) as first:
        endpoint = Endpoint(host="127.0.0.1", port=first.getsockname()[1])
        with bind(endpoint) as second:
            listen(first, endpoint)
            with pytest.raises(PortError, match=str(endpoint)):
                listen(second, endpoint)
