# SPDX-License-Identifier: Apache-2.0
"""Tokens at close range: threads that meet, passwords that stay where they belong."""

import threading
from collections.abc import Callable

import pytest
from msgspec import structs

from oci.registry.credentials import Credentials
from oci.registry.host import Host
from oci.registry.tokens import Authorizer
from oci.registry.transport import Answer, Connections
from oci.registry.url import Url
from rekindle.errors import CredentialsError, RegistryError
from tests.servers.registry import misbehaviour as wrong
from tests.servers.registry.access import PASSWORD, USERNAME, Auth
from tests.servers.registry.simulator import Registry
from tests.servers.registry.wire import Kind

RIGHT = Credentials(name=USERNAME, password=PASSWORD)


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
        end = host(registry, connections, structs.replace(RIGHT, password="guessed"))
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
