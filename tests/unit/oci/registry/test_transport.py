# SPDX-License-Identifier: Apache-2.0
"""Connections at close range: servers that speak no HTTP that ends, connections that are used again."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from msgspec import structs

from oci.registry.credentials import Credentials
from oci.registry.host import Bytes
from oci.registry.transport import Connections
from oci.registry.url import Url
from rekindle.errors import RegistryError
from tests.samples.registry import CLOSE_SETTINGS, CONTEXTS
from tests.servers.registry import misbehaviour as wrong
from tests.servers.registry.access import PASSWORD, USERNAME
from tests.servers.registry.misbehaviour import ANYTHING
from tests.servers.registry.simulator import Registry

RIGHT = Credentials(name=USERNAME, password=PASSWORD)


@contextlib.contextmanager
def serving(say: Callable[[socket.socket], None]) -> Iterator[Url]:
    """A server of one connection, that says what it wants to."""

    def serve() -> None:
        with contextlib.suppress(OSError):
            connection, _ = server.accept()
            with connection:
                connection.recv(1 << 16)
                say(connection)

    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(5)
        thread = threading.Thread(target=serve)
        thread.start()
        yield Url.parse(f"http://127.0.0.1:{server.getsockname()[1]}/")
        thread.join(10)
        assert not thread.is_alive()


def repeat(first: bytes, again: bytes, pause: float) -> Callable[[socket.socket], None]:
    def say(connection: socket.socket) -> None:
        connection.sendall(first)
        deadline = time.monotonic() + 8
        while time.monotonic() < deadline:
            connection.sendall(again)
            time.sleep(pause)

    return say


OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("first", "again", "pause"),
    [
        (OK + b"X: ", b"y", 0.05),
        (b"H", b"T", 0.05),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.05),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 100, 0),
        (CHUNKED + b"0\r\n", b"X: y\r\n" * 100, 0),
        (CHUNKED + b"0\r\n", b"X: y\r\n", 0.05),
        (CHUNKED, b"1\r\nx\r\n", 0.05),
        (CHUNKED, b"0", 0.01),
        (CHUNKED, b"-5\r\nxxxxx\r\n", 0.05),
        (OK + b"\r\n", b"x", 0.05),
        (OK + b"Content-Length: 1000\r\n\r\n", b"x", 0.05),
        (b"SSH-2.0-OpenSSH\r\n", b"x", 0.05),
        (b"\x15\x03\x01\x00\x02\x02\x46", b"\n", 0.05),
    ],
)
def test_nobody_holds_us_for_ever(first: bytes, again: bytes, pause: float) -> None:
    """Each byte comes in time, and there is no end of them."""
    pool = Connections(CLOSE_SETTINGS, CONTEXTS)
    with serving(repeat(first, again, pause)) as url:
        began = time.monotonic()
        with pytest.raises((OSError, RegistryError)), pool.request("GET", url, {}) as answer:
            answer.read(100_000)
        assert time.monotonic() - began < 4
        pool.close()


def test_an_answer_that_is_over_aborts_nobody(connections: Connections) -> None:
    with Registry() as registry:
        url = Url.parse(f"http://{registry.host}/v2/")
        first = connections.request("GET", url, {})
        first.read(100)
        first.close()
        second = connections.request("GET", url, {})
        assert second._connection is first._connection  # the same that was kept
        first.abort()
        first.close()
        assert second.read(100) == b"{}"
        second.close()
        assert len(connections._idle[url.origin]) == 1


def test_an_aborted_answer_is_not_used_again(connections: Connections) -> None:
    with Registry() as registry:
        url = Url.parse(f"http://{registry.host}/v2/")
        with connections.request("GET", url, {}) as answer:
            answer.read(100)
            answer.abort()
        assert not connections._idle[url.origin]
        assert not connections._open


@pytest.mark.parametrize("code", [401, 404, 307])
def test_small_errors_cost_no_connection(code: int, connections: Connections) -> None:
    with Registry(misbehave=[wrong.answers(ANYTHING, b"x" * 500, code=code)]) as registry:
        url = Url.parse(f"http://{registry.host}/v2/")
        connections.request("GET", url, {}).close()
        assert len(connections._idle[url.origin]) == 1


def test_a_kept_connection_that_broke_is_replaced(connections: Connections) -> None:
    with Registry() as registry:
        url = Url.parse(f"http://{registry.host}/v2/")
        for _ in range(3):
            with connections.request("GET", url, {}) as answer:
                assert answer.read(100) == b"{}"
            registry.pause()
            registry.resume()
        assert len(registry.requests) == 3


class Once(Bytes, frozen=True):
    """A body that must not be sent to the same place twice."""

    @property
    def is_repeatable(self) -> bool:
        return False


def test_a_body_is_sent_over_a_kept_connection_only_if_it_may_be_sent_again(connections: Connections) -> None:
    with Registry() as registry:
        url = Url.parse(f"http://{registry.host}/v2/")
        connections.request("GET", url, {}).close()
        [(_, kept)] = connections._idle[url.origin]
        with connections.request("PUT", url, {}, Once(b"x")) as answer:
            assert answer._connection is not kept
        idle = [connection for _, connection in connections._idle[url.origin]]
        with connections.request("PUT", url, {}, Bytes(b"x")) as answer:
            assert answer._connection in idle


def test_no_more_connections_are_kept_than_are_used_at_once() -> None:
    pool = Connections(structs.replace(CLOSE_SETTINGS, jobs=2), CONTEXTS)
    with Registry() as registry:
        url = Url.parse(f"http://{registry.host}/v2/")
        answers = [pool.request("GET", url, {}) for _ in range(5)]
        for answer in answers:
            answer.close()
        assert len(pool._idle[url.origin]) == len(pool._open) == 2
        pool.close()
        with pytest.raises(ConnectionError):
            pool.request("GET", url, {})


@pytest.mark.parametrize("value", ["a\r\nX-Evil: 1", "a\nb", "ä€"])
def test_headers_are_not_injected(value: str, connections: Connections) -> None:
    with Registry() as registry:
        url = Url.parse(f"http://{registry.host}/v2/")
        with pytest.raises(ValueError):
            connections.request("GET", url, {"Accept": value})
        with pytest.raises(ConnectionError):
            connections.request("GET", structs.replace(url, target="/a b\r\nX: y"), {})
        assert not registry.requests
        assert not connections._open
