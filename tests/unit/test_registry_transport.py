# SPDX-License-Identifier: Apache-2.0
"""Connections and tokens at close range: servers that speak no HTTP that ends, threads that meet."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from oci.registry.certificates import Certificates
from oci.registry.credentials import Credentials
from oci.registry.host import Bytes, Host
from oci.registry.tokens import Authorizer
from oci.registry.transport import Answer, Connections
from oci.registry.url import Url
from rekindle.config import RetryPolicy, TransferSettings
from rekindle.errors import CredentialsError, RegistryError
from tests.servers.registry import misbehaviour as wrong
from tests.servers.registry.access import PASSWORD, USERNAME, Auth
from tests.servers.registry.misbehaviour import ANYTHING
from tests.servers.registry.simulator import Registry
from tests.servers.registry.wire import Kind

SETTINGS = TransferSettings(
    connect_seconds=1, stall_seconds=1, retry=RetryPolicy(attempts=3, longest_wait_seconds=2)
)
CONTEXTS = Certificates({}, ()).context
RIGHT = Credentials(name=USERNAME, password=PASSWORD)


@pytest.fixture
def connections() -> Iterator[Connections]:
    pool = Connections(SETTINGS, CONTEXTS)
    yield pool
    pool.close()


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
    pool = Connections(SETTINGS, CONTEXTS)
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


class Once(Bytes):
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
    pool = Connections(replace(SETTINGS, jobs=2), CONTEXTS)
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
            connections.request("GET", replace(url, target="/a b\r\nX: y"), {})
        assert not registry.requests
        assert not connections._open


# Tokens.


def host(registry: Registry, pool: Connections, credentials: Credentials | None) -> Host:
    base = Url.parse(f"http://{registry.host}/")
    return Host(base, pool, lambda _: credentials, name=registry.host, login=registry.host)


def side_by_side(count: int, work: Callable[[], object]) -> list[object]:
    results: list[object] = []

    def run() -> None:
        try:
            results.append(work())
        except Exception as error:
            results.append(type(error))

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(results) == count
    return results


def read_blob(end: Host, digest: str) -> bytes:
    scope = "repository:a/b:pull"
    with end.ask("GET", f"a/b/blobs/{digest}", scope=scope, expected=frozenset({200})) as answer:
        return answer.read(100)


def test_sixteen_threads_ask_for_one_token(connections: Connections) -> None:
    with Registry(auth=Auth.TOKEN, misbehave=[wrong.late(wrong.TOKEN, 0.1)]) as registry:
        digest = registry.add_blob("a/b", b"content")
        end = host(registry, connections, RIGHT)
        assert side_by_side(16, lambda: read_blob(end, digest)) == [b"content"] * 16
        assert len(registry.asked(None, Kind.TOKEN)) == 1


def test_a_wrong_password_is_tried_once_by_sixteen_threads(connections: Connections) -> None:
    with Registry(auth=Auth.TOKEN, misbehave=[wrong.late(wrong.TOKEN, 0.1)]) as registry:
        end = host(registry, connections, replace(RIGHT, password="guessed"))
        assert side_by_side(16, lambda: read_blob(end, "x")) == [CredentialsError] * 16
        assert len(registry.asked(None, Kind.TOKEN)) == 1


def test_a_refresh_token_takes_the_password_s_place(connections: Connections) -> None:
    with Registry(auth=Auth.TOKEN) as registry:
        digest = registry.add_blob("a/b", b"content")
        identity = Credentials(name="<token>", password=registry.refresh_token, identity=True)
        assert read_blob(host(registry, connections, identity), digest) == b"content"
        assert [r.method for r in registry.asked(None, Kind.TOKEN)] == ["POST"]


@pytest.mark.parametrize(
    ("base", "realm", "goes"),
    [
        ("https://a.example/", "https://b.example/token", True),
        ("https://a.example/", "http://a.example/token", False),
        ("https://a.example/", "http://127.0.0.1/token", False),
        ("http://a.example/", "http://a.example:81/token", True),
        ("http://a.example/", "http://127.0.0.1/token", True),
        ("http://a.example/", "http://b.example/token", False),
        ("http://127.0.0.1/", "http://b.example/token", False),
        ("http://127.0.0.1/", "https://b.example/token", True),
    ],
)
def test_where_a_password_goes(base: str, realm: str, goes: bool) -> None:
    asked = []

    def ask(_: str, url: Url, headers: dict[str, str], __: bytes | None) -> Answer:
        asked.append((str(url).partition("/token")[0], "Authorization" in headers))
        raise ConnectionError

    authorizer = Authorizer("a", ask, base=Url.parse(base), find=lambda _: RIGHT)  # type: ignore[arg-type]
    authorizer.answer(None, [f'Bearer realm="{realm}"'], "repository:a:pull")
    with pytest.raises(ConnectionError if goes else RegistryError):
        authorizer.header("repository:a:pull")
    assert [there for _, there in asked] == ([True] if goes else [])


def test_each_scope_is_asked_for_with_what_its_own_challenge_wanted() -> None:
    asked = []

    def ask(_: str, url: Url, __: dict[str, str], ___: bytes | None) -> Answer:
        asked.append(url.target)
        raise ConnectionError

    authorizer = Authorizer("a", ask, base=Url.parse("http://a/"), find=lambda _: None)  # type: ignore[arg-type]
    wants = 'Bearer realm="http://a/t",scope="repository:x:pull,push repository:y:pull"'
    authorizer.answer(None, [wants], "repository:x:pull,push")
    for scope in ("repository:x:pull,push", "repository:x:pull"):
        with pytest.raises(ConnectionError):
            authorizer.header(scope)
    assert "repository%3Ay%3Apull" in asked[0]
    assert asked[1] == "/t?scope=repository%3Ax%3Apull"
