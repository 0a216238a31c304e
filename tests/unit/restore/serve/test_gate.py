# SPDX-License-Identifier: Apache-2.0
"""The gate refuses what vLLM's own middleware refuses, passes the rest on unchanged, and holds little."""

import contextlib
import selectors
import socket
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from rekindle.engine import Endpoint
from rekindle.engine.vllm_authentication import Guard
from restore.serve.forward import Forwarder
from restore.serve.gate import HEAD_LIMIT_BYTES, ApiKeyGate
from tests.conftest import SERVERS, VLLM_BIN, free_port, wait_for
from tests.samples.http_requests import KEY, REQUESTS, STRICTER, statuses, talk

VERSION = "0.32.0+cpu"
GUARD = Guard.of([KEY], version=VERSION)
AUTHORIZED = b"Authorization: Bearer %s\r\n" % KEY.encode()
ALLOWED = b"GET /v1/models HTTP/1.1\r\nHost: x\r\n" + AUTHORIZED + b"\r\n"
REFUSED = b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n"
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"


class Here:
    def socket(self, family: socket.AddressFamily) -> socket.socket:
        return socket.socket(family, socket.SOCK_STREAM)


@contextlib.contextmanager
def forwarded(target: Endpoint, guard: Guard) -> Iterator[int]:
    """The port of a gate before a server."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=200)
    woken, wake = socket.socketpair()
    with selectors.DefaultSelector() as selector, woken, wake:
        selector.register(woken, selectors.EVENT_READ, None)
        forwarder = Forwarder(selector, Here())
        forwarder.accept_from(listener, target, lambda forwarded_for="": ApiKeyGate(guard, str(target)))

        def loop() -> None:
            while True:
                for key, mask in selector.select():
                    if key.data is None:
                        return
                    key.data(mask)

        thread = threading.Thread(target=loop)
        thread.start()
        try:
            yield int(listener.getsockname()[1])
        finally:
            wake.close()
            thread.join(10)
            forwarder.close()


@contextlib.contextmanager
def uvicorn(root_path: str, *keys: str) -> Iterator[int]:
    port = free_port()
    command = [str(VLLM_BIN / "python"), str(SERVERS / "guarded.py"), str(port), root_path, *keys]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            wait_for(lambda: _reachable(port), 60)
            yield port
        finally:
            process.kill()


def _reachable(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


@pytest.fixture(scope="module", params=["", "/root"])
def ports(request: pytest.FixtureRequest) -> Iterator[tuple[int, int]]:
    """The ports of vLLM's middleware with the key, and of a gate before the same without one."""
    guard = Guard.of([KEY], version=VERSION, root_path=request.param)
    with (
        uvicorn(request.param, KEY) as cold,
        uvicorn(request.param) as inner,
        forwarded(Endpoint(host="127.0.0.1", port=inner), guard) as gate,
    ):
        yield cold, gate


@pytest.mark.vllm
def test_it_answers_as_vllms_middleware_or_refuses(ports: tuple[int, int]) -> None:
    with ThreadPoolExecutor(32) as pool:
        cold, gated = (
            list(pool.map(lambda content, port=port: statuses(talk(port, content)), REQUESTS.values()))
            for port in ports
        )
    for name, expected, got in zip(REQUESTS, cold, gated, strict=True):
        if got != STRICTER.get(name, expected):  # on a busy machine, an answer may have come too late
            answers = [statuses(talk(port, REQUESTS[name], seconds=5)) for port in ports]
            assert answers[1] == STRICTER.get(name, answers[0]), name
    assert sum(401 in each for each in gated) > 60
    for name, got in STRICTER.items():
        assert got[-1] in {400, 401, 431}, name


@pytest.mark.vllm
def test_the_refusal_is_that_of_vllm(ports: tuple[int, int]) -> None:
    cold, gated = (talk(port, REFUSED).partition(b"\r\n\r\n") for port in ports)
    assert gated[2] == cold[2] == b'{"error":"Unauthorized"}'
    kept = (b"content-type", b"content-length")
    heads = [
        sorted(line.lower() for line in head.split(b"\r\n") if line.lower().startswith(kept))
        for head in (cold[0], gated[0])
    ]
    assert heads[0] == heads[1]
    assert len(heads[0]) == 2
    assert b"access-control" not in gated[0].lower()


@pytest.mark.vllm
def test_a_websocket_is_passed_on_both_ways(ports: tuple[int, int]) -> None:
    with socket.create_connection(("127.0.0.1", ports[1]), timeout=10) as sock:
        sock.sendall(REQUESTS["websocket"])
        head = b""
        while b"\r\n\r\n" not in head:
            head += sock.recv(4096)
        assert statuses(head) == [101]
        sock.sendall(b"\x81\x85\0\0\0\0hello")
        assert sock.recv(4096) == b"\x81\x05hello"


@pytest.mark.vllm
def test_large_bodies_pass_whole(ports: tuple[int, int]) -> None:
    size = 5 << 20
    head = b"POST /v1/echo HTTP/1.1\r\nHost: x\r\nConnection: close\r\n%sContent-Length: %d\r\n\r\n"
    answer = talk(ports[1], head % (AUTHORIZED, size) + b"x" * size, seconds=20)
    assert b'"bytes":%d,' % size in answer
    ask = b"GET /v1/stream?pieces=200&size=65536 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n%s\r\n"
    streamed = talk(ports[1], ask % AUTHORIZED, seconds=20)
    assert streamed.partition(b"\r\n\r\n")[2].count(b"x") == 200 * 65536


def gate() -> ApiKeyGate:
    return ApiKeyGate(GUARD, "127.0.0.1:8000")


def test_a_request_is_parsed_however_it_is_cut() -> None:
    for step in (1, 2, 7, 30):
        passing = gate()
        for at in range(0, len(ALLOWED), step):
            assert not passing.to_server or at >= len(ALLOWED) - step
            passing.from_client(ALLOWED[at : at + step])
        assert passing.to_server.startswith(b"GET /v1/models HTTP/1.1\r\n")
        assert not passing.to_client


def test_a_key_is_kept_from_a_server_that_asks_for_none() -> None:
    hiding = ApiKeyGate(GUARD, "127.0.0.1:8000", hides_key=True)
    hiding.from_client(ALLOWED)
    assert hiding.to_server.startswith(b"GET /v1/models HTTP/1.1\r\n")
    assert b"authorization" not in hiding.to_server.lower()
    passing = gate()
    passing.from_client(ALLOWED)
    assert b"authorization" in passing.to_server.lower()


def test_no_byte_of_a_refused_request_reaches_the_server() -> None:
    passing = gate()
    passing.from_client(b"POST /v1/x HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n" + b"a" * 50)
    passing.from_client(b"a" * 50)
    assert statuses(bytes(passing.to_client)) == [401]
    passing.from_client(ALLOWED)
    assert passing.to_server.count(b"HTTP/1.1") == 1


def test_the_next_request_waits_for_the_answer() -> None:
    passing = gate()
    passing.from_client(ALLOWED + REFUSED + ALLOWED)
    assert passing.to_server.count(b"HTTP/1.1") == 1
    assert not passing.to_client
    assert passing.waiting_bytes == len(REFUSED + ALLOWED)
    passing.from_server(ANSWER)
    assert statuses(bytes(passing.to_client)) == [200, 401]
    assert passing.to_server.count(b"HTTP/1.1") == 2
    assert not passing.is_over


def test_what_the_server_says_unasked_ends_the_connection() -> None:
    passing = gate()
    passing.from_server(ANSWER)
    assert passing.is_over
    assert not passing.to_client
    passing = gate()
    passing.from_client(ALLOWED)
    passing.from_server(ANSWER + ANSWER)
    assert statuses(bytes(passing.to_client)) == [200]


def test_a_head_is_bounded() -> None:
    passing = gate()
    sent = 0
    while not passing.is_over:
        passing.from_client(b"GET /health HTTP/1.1\r\nX: " if not sent else b"a" * 1000)
        sent += 1000
        assert sent < 2 * HEAD_LIMIT_BYTES
    assert statuses(bytes(passing.to_client)) == [431]
    assert not passing.to_server


@pytest.mark.parametrize(
    "answer", [b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n"]
)
def test_an_answer_that_ends_with_the_connection_ends_it(answer: bytes) -> None:
    passing = gate()
    passing.from_client(ALLOWED)
    passing.from_server(answer + b"abc")
    passing.from_server(b"")
    assert b"abc" in passing.to_client
    assert passing.is_over


def test_a_bug_in_the_gate_ends_the_connection_and_not_the_server(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        target = Endpoint(host="127.0.0.1", port=server.getsockname()[1])
        with forwarded(target, GUARD) as port:
            monkeypatch.setattr(Guard, "refuses", lambda *_: 1 / 0)
            assert talk(port, ALLOWED) == b""
            monkeypatch.undo()
            assert statuses(talk(port, REFUSED)) == [401]
    assert "ZeroDivisionError" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("version", "path", "refused"),
    [
        ("0.32.0", "/tokenize", False),
        ("0.32.7+cu130", "/v1/models", True),
        ("0.9.1", "/tokenize", False),
        ("0.33.0", "/tokenize", True),
        ("", "/tokenize", True),
        ("1.0", "/new", True),
        *((version, "/health", False) for version in ("0.9", "0.32.0", "0.33.0", "")),
    ],
)
def test_of_an_unknown_version_only_what_is_always_open_is(version: str, path: str, refused: bool) -> None:
    guard = Guard.of([KEY], version=version)
    assert guard.refuses(b"GET", path.encode(), []) is refused
    assert not guard.refuses(b"GET", path.encode(), [(b"authorization", f"Bearer {KEY}".encode())])


def test_keys_that_are_not_ascii_are_compared_as_vllm_does() -> None:
    guard = Guard.of(["clé"], version=VERSION)
    assert not guard.refuses(b"GET", b"/v1", [(b"Authorization", "Bearer clé".encode("latin-1"))])
    assert guard.refuses(b"GET", b"/v1", [(b"Authorization", "Bearer clé".encode())])


def test_a_guard_does_not_hold_the_key() -> None:
    assert KEY not in repr(GUARD)
