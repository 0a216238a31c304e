# SPDX-License-Identifier: Apache-2.0
"""A client gets a whole answer in time, or an error that says what happened."""

import contextlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from rekindle.engine import Endpoint, Request
from rekindle.engine.client import Client, Response
from rekindle.errors import NotReadyError
from tests.conftest import wait_for

Play = Callable[[socket.socket], object]
QUESTION = Request(method="POST", path="/ask?a=b", headers={"X-Kind": "oracle"}, body={"text": "é"})


def read_request(sock: socket.socket) -> bytes:
    """A request to its end: what is not read would reset the connection."""
    content = b""
    while b"\r\n\r\n" not in content:
        content += sock.recv(1 << 16)
    head, _, body = content.partition(b"\r\n\r\n")
    length = re.search(rb"Content-Length: (\d+)", head)
    while length and len(body) < int(length[1]):
        body += sock.recv(1 << 16)
    return head + b"\r\n\r\n" + body


class Server:
    """The other end of every connection, played by a function."""

    def __init__(self) -> None:
        self.play: Play = lambda sock: None
        self.received = b""
        self._threads: list[threading.Thread] = []

    def connect(self, host: str, port: int, timeout: float) -> socket.socket:
        assert (host, port) == ("127.0.0.1", 8000)
        ours, theirs = socket.socketpair()
        ours.settimeout(timeout)
        thread = threading.Thread(target=self._serve, args=[theirs])
        thread.start()
        self._threads.append(thread)
        return ours

    def _serve(self, sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError):
            self.received = read_request(sock)
            self.play(sock)

    def join(self) -> None:
        for thread in self._threads:
            thread.join(20)
            assert not thread.is_alive()


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.join()


def ask(server: Server, play: Play, *, request: Request = QUESTION, timeout: float = 10) -> Response:
    server.play = play
    return Client(Endpoint(host="0.0.0.0", port=8000), server.connect).ask(request, timeout=timeout)


def saying(*parts: bytes, pause: float = 0.0) -> Play:
    def play(sock: socket.socket) -> None:
        for part in parts:
            sock.sendall(part)
            time.sleep(pause)

    return play


HEAD = b"HTTP/1.1 200 OK\r\n"


def test_a_question_is_sent_as_it_is(server: Server) -> None:
    ask(server, saying(HEAD + b"\r\n"))
    head, body = server.received.split(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    assert lines[0] == b"POST /ask?a=b HTTP/1.1"
    assert {b"X-Kind: oracle", b"Content-Type: application/json", b"Host: 127.0.0.1:8000"} <= set(lines)
    assert json.loads(body) == {"text": "é"}


def test_a_question_without_a_body_has_none(server: Server) -> None:
    ask(server, saying(HEAD + b"\r\n"), request=Request(method="GET", path="/", headers={}, body=None))
    assert server.received.endswith(b"\r\n\r\n")
    assert b"content" not in server.received.lower()


@pytest.mark.parametrize(
    "answer",
    [
        [HEAD + b"Content-Length: 5\r\n\r\nhello"],
        [HEAD + b"\r\nhel", b"lo"],
        [HEAD + b"Transfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n", b"3\r\nllo\r\n0\r\n\r\n"],
        [b"HTTP/1.1 100 Continue\r\n\r\n", HEAD + b"\r\nhello"],
    ],
)
def test_a_whole_answer_is_read(server: Server, answer: list[bytes]) -> None:
    response = ask(server, saying(*answer, pause=0.01))
    assert (response.status, response.body) == (200, b"hello")


def test_any_status_is_an_answer(server: Server) -> None:
    response = ask(server, saying(b"HTTP/1.1 503 Busy\r\nContent-Length: 2\r\n\r\nno"))
    assert (response.status, response.body) == (503, b"no")


def test_the_first_byte_is_timed(server: Server) -> None:
    began = time.monotonic()
    response = ask(server, saying(HEAD + b"\r\n", b"first", b"second", pause=0.1))
    assert response.first_byte - began == pytest.approx(0.1, abs=0.08)


def test_a_server_that_is_silent_is_not_ready(server: Server) -> None:
    with pytest.raises(NotReadyError, match="/ask"):
        ask(server, lambda sock: sock.recv(1), timeout=0.2)


@pytest.mark.parametrize(
    "head", [b"HTTP/1.1 200 ", HEAD + b"X: ", HEAD + b"\r\n", HEAD + b"Content-Length: 99\r\n\r\n"]
)
def test_a_server_that_dawdles_is_not_ready(server: Server, head: bytes) -> None:
    began = time.monotonic()
    with pytest.raises(NotReadyError):
        ask(server, saying(head, *[b"x"] * 50, pause=0.05), timeout=0.3)
    assert time.monotonic() - began < 2


def test_an_endless_answer_is_refused(server: Server) -> None:
    def play(sock: socket.socket) -> None:
        sock.sendall(HEAD + b"\r\n")
        while True:
            sock.sendall(bytes(1 << 20))

    with pytest.raises(NotReadyError, match="more than"):
        ask(server, play)


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"hello",
        b"SSH-2.0-OpenSSH\r\n",
        b"HTTP/1.1 x OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100_000 + b"\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhel",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\nhello",
    ],
    ids=["nothing", "text", "ssh", "no status", "many headers", "long header", "cut off", "no length"],
)
def test_what_is_no_http_is_a_connection_error(server: Server, answer: bytes) -> None:
    with pytest.raises(ConnectionError):
        ask(server, saying(answer))


def test_a_server_that_is_not_there_is_an_os_error() -> None:
    def refuse(host: str, port: int, timeout: float) -> socket.socket:
        raise ConnectionRefusedError

    with pytest.raises(ConnectionRefusedError):
        Client(Endpoint(host="::1", port=1), refuse).get("/", timeout=1)


def test_no_thread_is_left(server: Server) -> None:
    before = threading.active_count()
    for _ in range(5):
        ask(server, saying(HEAD + b"\r\n"))
    server.join()
    wait_for(lambda: threading.active_count() == before, 10)
