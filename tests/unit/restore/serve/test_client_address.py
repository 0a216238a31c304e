# SPDX-License-Identifier: Apache-2.0
"""A server learns who its clients are: by the PROXY protocol, or by a header in each request."""

import contextlib
import http.client
import selectors
import socket
import struct
import threading
from collections.abc import Iterator

import pytest

from rekindle.engine import Endpoint
from restore.client_address import ClientAddress
from restore.serve.address import bind, listen
from restore.serve.forward import Forwarder

SIGNATURE = bytes.fromhex("0d0a0d0a000d0a515549540a")  # of proxy-protocol.txt, section 2.2


class Host:
    def socket(self, family: socket.AddressFamily) -> socket.socket:
        return socket.socket(family, socket.SOCK_STREAM)


@contextlib.contextmanager
def forwarded(kind: ClientAddress, host: str = "127.0.0.1") -> Iterator[tuple[socket.socket, int]]:
    """A server's listening socket, and the port that leads to it."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        server.settimeout(20)
        target = Endpoint(host="127.0.0.1", port=server.getsockname()[1])
        selector = stack.enter_context(selectors.DefaultSelector())
        forwarder = Forwarder(selector, Host(), kind)
        published = bind(Endpoint(host=host, port=0))
        listen(published, target)
        port = published.getsockname()[1]
        forwarder.accept_from(published, target)
        stop, stopped = socket.socketpair()
        selector.register(stopped, selectors.EVENT_READ, None)

        def loop() -> None:
            while True:
                for key, mask in selector.select():
                    if key.data is None:
                        return
                    key.data(mask)

        thread = threading.Thread(target=loop)
        thread.start()
        try:
            yield server, port
        finally:
            stop.close()
            thread.join(20)
            forwarder.close()
            stopped.close()


def received(sock: socket.socket, size: int) -> bytes:
    content = b""
    while len(content) < size:
        content += (piece := sock.recv(size - len(content)))
        assert piece, content
    return content


@pytest.mark.parametrize("host", ["127.0.0.1", "::"])
def test_version_1_is_a_line_before_the_first_byte(host: str) -> None:
    """At `::` a client of IPv4 has an address of IPv6, but is one of IPv4."""
    with (
        forwarded(ClientAddress.PROXY_V1, host) as (server, port),
        socket.create_connection(("127.0.0.1", port)) as client,
    ):
        client.sendall(b"hello")
        taken, _ = server.accept()
        line = f"PROXY TCP4 127.0.0.1 127.0.0.1 {client.getsockname()[1]} {port}\r\n".encode()
        assert received(taken, len(line) + 5) == line + b"hello"
        taken.close()


def test_it_comes_before_the_client_has_said_anything() -> None:
    with forwarded(ClientAddress.PROXY_V1) as (server, port), socket.create_connection(("127.0.0.1", port)):
        taken, _ = server.accept()
        assert received(taken, 6) == b"PROXY "
        taken.close()


def test_version_2_has_the_addresses_in_bytes() -> None:
    with (
        forwarded(ClientAddress.PROXY_V2, "::1") as (server, port),
        socket.create_connection(("::1", port)) as client,
    ):
        client.sendall(b"hello")
        taken, _ = server.accept()
        one = socket.inet_pton(socket.AF_INET6, "::1")
        ports = struct.pack("!HH", client.getsockname()[1], port)
        expected = SIGNATURE + b"\x21\x21\x00\x24" + one + one + ports + b"hello"
        assert received(taken, len(expected)) == expected
        taken.close()


def head(sock: socket.socket) -> list[bytes]:
    content = b""
    while b"\r\n\r\n" not in content:
        content += (piece := sock.recv(1))
        assert piece
    return content.split(b"\r\n")[:-2]


@pytest.mark.parametrize(
    ("sent", "told"),
    [([], b"127.0.0.1"), (["192.0.2.1"], b"192.0.2.1, 127.0.0.1"), (["1", "2, 3"], b"1, 2, 3, 127.0.0.1")],
)
def test_each_request_of_a_connection_has_the_header(sent: list[str], told: bytes) -> None:
    """What a client says of itself stays before what we know, which is what servers believe."""
    with forwarded(ClientAddress.FORWARDED_FOR) as (server, port):
        client = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        client.connect()
        taken, _ = server.accept()
        for body in (b"", b"x" * 100_000):
            client.putrequest("POST", "/")
            for value in sent:
                client.putheader("x-forwarded-for", value)
            client.putheader("Content-Length", str(len(body)))
            client.endheaders(body)
            found = [line for line in head(taken) if line.lower().startswith(b"x-forwarded-for")]
            assert found == [b"X-Forwarded-For: " + told]
            assert received(taken, len(body)) == body
            taken.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n")
            assert client.getresponse().read() == b"ab"
        client.close()
        taken.close()


def test_a_websocket_is_passed_on() -> None:
    with (
        forwarded(ClientAddress.FORWARDED_FOR) as (server, port),
        socket.create_connection(("127.0.0.1", port), timeout=20) as client,
    ):
        client.sendall(b"GET /ws HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
        taken, _ = server.accept()
        assert b"X-Forwarded-For: 127.0.0.1" in head(taken)
        taken.sendall(b"HTTP/1.1 101 Switching\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n\x81\x01a")
        assert head(client)[0].startswith(b"HTTP/1.1 101")
        assert received(client, 3) == b"\x81\x01a"
        client.sendall(b"\x00\xff")
        assert received(taken, 2) == b"\x00\xff"
        taken.close()
