# SPDX-License-Identifier: Apache-2.0
"""Registries behind proxies: which is taken, what it is told, and what it does not learn."""

import base64
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from oci.layout import Layout
from oci.registry.access import Access
from oci.registry.proxy import Proxy as Found
from oci.registry.proxy import proxy_for
from oci.registry.url import Url
from rekindle.errors import RegistryError
from tests.samples.registry import (
    SETTINGS,
    Sample,
    access_to,
    assert_all_there,
    pull,
    push,
    said,
    within,
)
from tests.servers.registry.access import PASSWORD, Auth
from tests.servers.registry.relay import Authority, Proxy, Tls
from tests.servers.registry.simulator import Registry

NAME = "registry.test"
NAMES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "REQUEST_METHOD")

pytestmark = pytest.mark.usefixtures("small_stretches")


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "authority")


@pytest.fixture
def registry(sample: Sample) -> Iterator[Registry]:
    with Registry(auth=Auth.BASIC) as registry:
        sample.serve(registry)
        yield registry


def trusting(authority: Authority, tmp_path: Path, *hosts: str, plain_http: bool | None = None) -> Access:
    """An access that trusts an authority for some hosts, by certs.d."""
    for host in hosts:
        place = tmp_path / "certs.d" / host
        place.mkdir(parents=True)
        (place / "ca.crt").write_bytes(authority.certificate.read_bytes())
    access = access_to()
    return Access(
        config=access.config,
        tally=access.tally,
        limiter=access.limiter,
        plain_http=plain_http,
        find_credentials=access.find_credentials,
        certs_d=(tmp_path / "certs.d",),
    )


def test_http_goes_through_a_proxy_in_absolute_form(
    sample: Sample, registry: Registry, authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = Layout.create(tmp_path / "layout")
    with Proxy({f"{NAME}:80": registry.host}) as proxy:
        monkeypatch.setenv("http_proxy", f"http://{proxy.host}")
        pull(f"{NAME}/a/b:1", target, trusting(authority, tmp_path, plain_http=True))
    assert_all_there(target, sample.root, sample)
    assert {line.split()[0] for line in proxy.asked} == {"GET"}
    assert all(line.split()[1].startswith(f"http://{NAME}/v2/") for line in proxy.asked)
    assert {headers["host"] for headers in proxy.headers} == {NAME}
    assert proxy.accepted <= SETTINGS.jobs + 1  # connections are used again


def test_a_push_goes_through_a_proxy(
    sample: Sample, registry: Registry, authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Proxy({f"{NAME}:5000": registry.host}) as proxy:
        monkeypatch.setenv("http_proxy", proxy.host)
        push(sample, f"{NAME}:5000/c/d:2", trusting(authority, tmp_path, plain_http=True))
    assert registry.repositories["c/d"].tags["2"] == sample.root.digest
    assert {headers["host"] for headers in proxy.headers} == {f"{NAME}:5000"}


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_https_goes_through_a_tunnel_of_which_the_proxy_sees_nothing(
    scheme: str,
    sample: Sample,
    registry: Registry,
    authority: Authority,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target = Layout.create(tmp_path / "layout")
    access = trusting(authority, tmp_path, NAME, "127.0.0.1")
    with (
        Tls(authority.issue(NAME), registry.host) as front,
        Proxy({f"{NAME}:443": front.host}, login="me:pass word") as proxy,
        Tls(authority.issue("127.0.0.1"), proxy.host) as tls,
    ):
        where = proxy.host if scheme == "http" else tls.host
        access = trusting(authority, tmp_path / "more", NAME, where)
        monkeypatch.setenv("HTTPS_PROXY", f"{scheme}://me:pass%20word@{where}")
        pull(f"{NAME}/a/b:1", target, access)
    assert_all_there(target, sample.root, sample)
    assert {line.rpartition(" ")[0] for line in proxy.asked} == {f"CONNECT {NAME}:443"}
    assert set(front.names) == {NAME}
    assert proxy.accepted <= SETTINGS.jobs + 1
    known = base64.b64encode(f"user:{PASSWORD}".encode()).decode()
    assert known not in json.dumps(proxy.headers)
    assert not [r for r in registry.requests if "proxy-authorization" in r.headers]


def test_http_goes_through_a_tls_proxy(
    sample: Sample, registry: Registry, authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = Layout.create(tmp_path / "layout")
    with (
        Proxy({f"{NAME}:80": registry.host}, login="me:secret") as proxy,
        Tls(authority.issue("127.0.0.1"), proxy.host) as tls,
    ):
        monkeypatch.setenv("http_proxy", f"https://me:secret@{tls.host}")
        pull(f"{NAME}/a/b:1", target, trusting(authority, tmp_path, tls.host, plain_http=True))
    assert_all_there(target, sample.root, sample)
    assert all(line.split()[1].startswith(f"http://{NAME}/v2/") for line in proxy.asked)
    assert not [r for r in registry.requests if "proxy-authorization" in r.headers]


@pytest.mark.parametrize("plain_http", [True, False])
def test_a_tls_proxy_of_an_unknown_authority_is_told_nothing(
    plain_http: bool, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Authority(tmp_path / "other")
    with (
        Proxy({f"{NAME}:80": registry.host, f"{NAME}:443": registry.host}) as proxy,
        Tls(other.issue("127.0.0.1"), proxy.host) as tls,
    ):
        monkeypatch.setenv("all_proxy", f"https://{tls.host}")
        access = trusting(Authority(tmp_path / "ours"), tmp_path, NAME, tls.host, plain_http=plain_http)
        with pytest.raises(RegistryError, match="cannot be reached") as raised:
            pull(f"{NAME}/a/b:1", Layout.create(tmp_path / "layout"), access)
    assert "certificate" in said(raised.value)
    assert f"through the proxy https://{tls.host}" in said(raised.value)
    assert not proxy.asked
    assert not registry.requests


def test_a_registry_of_an_unknown_authority_is_not_trusted_in_a_tunnel(
    registry: Registry, authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Authority(tmp_path / "other")
    with Tls(other.issue(NAME), registry.host) as front, Proxy({f"{NAME}:443": front.host}) as proxy:
        monkeypatch.setenv("https_proxy", f"http://{proxy.host}")
        with pytest.raises(RegistryError, match="cannot be reached"):
            pull(f"{NAME}/a/b:1", Layout.create(tmp_path / "layout"), trusting(authority, tmp_path, NAME))
    assert registry.requests == []


@pytest.mark.parametrize("plain_http", [True, False])
@pytest.mark.parametrize("login", ["", "me:wrong@", "me@"])
def test_a_proxy_that_asks_for_a_password(
    login: str, plain_http: bool, authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Proxy({}, login="me:secret") as proxy:
        monkeypatch.setenv("all_proxy", f"http://{login}{proxy.host}")
        access = trusting(authority, tmp_path, plain_http=plain_http)
        with within(1), pytest.raises(RegistryError) as raised:
            pull(f"{NAME}/a/b:1", Layout.create(tmp_path / "layout"), access)
    assert "407" in said(raised.value)
    assert "proxy" in said(raised.value)
    assert "wrong" not in said(raised.value)


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 502 Bad Gateway\r\n\r\n",
        b"nonsense\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 100_000 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 Connected\r\n",
        b"drips" + b"HTTP/1.1 200 Connected\r\nX: " + b"y" * 1000,
    ],
    ids=["502", "nonsense", "many headers", "a long header", "no end", "drips"],
)
def test_a_proxy_that_gives_no_tunnel_is_not_waited_for_long(
    answer: bytes,
    registry: Registry,
    authority: Authority,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drips, answer = answer.startswith(b"drips"), answer.removeprefix(b"drips")
    with Proxy({f"{NAME}:443": registry.host}, answer=answer, drips=drips) as proxy:
        monkeypatch.setenv("https_proxy", f"http://{proxy.host}")
        access = trusting(authority, tmp_path, NAME)
        with within(4), pytest.raises(RegistryError) as raised:
            pull(f"{NAME}/a/b:1", Layout.create(tmp_path / "layout"), access)
    assert f"through the proxy http://{proxy.host}" in said(raised.value)


def test_a_proxy_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://user:secret@127.0.0.1:1")
    with within(1), pytest.raises(RegistryError, match="cannot be reached") as raised:
        pull(f"{NAME}/a/b:1", Layout.create(tmp_path), access_to())
    assert "through the proxy http://127.0.0.1:1:" in raised.value.cause
    assert "secret" not in said(raised.value)


def test_a_host_of_no_proxy_is_reached_directly(
    sample: Sample, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    port = int(registry.host.rpartition(":")[2])
    real = socket.getaddrinfo

    def resolve(host: str, *args: object, **options: object) -> object:
        return real("127.0.0.1" if host == NAME else host, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    target = Layout.create(tmp_path)
    with Proxy({}) as proxy:
        monkeypatch.setenv("http_proxy", f"http://{proxy.host}")
        monkeypatch.setenv("no_proxy", f"example.com,{NAME}:{port}")
        access = access_to()
        access = Access(
            config=access.config,
            tally=access.tally,
            limiter=access.limiter,
            plain_http=True,
            find_credentials=access.find_credentials,
        )
        pull(f"{NAME}:{port}/a/b:1", target, access)
    assert_all_there(target, sample.root, sample)
    assert proxy.accepted == 0


# Which proxy is taken.


@pytest.mark.parametrize(
    ("environment", "url", "proxy"),
    [
        ({}, "http://a.test/", None),
        ({"http_proxy": "p"}, "http://a.test/", "http://p:80"),
        ({"http_proxy": "p"}, "https://a.test/", None),
        ({"https_proxy": "p"}, "https://a.test/", "http://p:80"),
        ({"https_proxy": "p"}, "http://a.test/", None),
        ({"HTTP_PROXY": "p:3128"}, "http://a.test/", "http://p:3128"),
        ({"HTTPS_PROXY": "p:3128"}, "https://a.test/", "http://p:3128"),
        ({"HTTPS_PROXY": "upper", "https_proxy": "lower"}, "https://a.test/", "http://lower:80"),
        ({"HTTPS_PROXY": "upper", "https_proxy": ""}, "https://a.test/", "http://upper:80"),
        ({"all_proxy": "p"}, "http://a.test/", "http://p:80"),
        ({"ALL_PROXY": "p"}, "https://a.test/", "http://p:80"),
        ({"ALL_PROXY": "all", "http_proxy": "p"}, "http://a.test/", "http://p:80"),
        ({"https_proxy": "https://p"}, "https://a.test/", "https://p:443"),
        ({"https_proxy": "HTTPS://P.Example:8443/x?y"}, "https://a.test/", "https://p.example:8443"),
        ({"https_proxy": "http://[2001:db8::1]:8080"}, "https://a.test/", "http://[2001:db8::1]:8080"),
        ({"http_proxy": "localhost"}, "http://a.test/", "http://localhost:80"),
        # A CGI program gets the header `Proxy` of any client as HTTP_PROXY.
        ({"HTTP_PROXY": "p", "REQUEST_METHOD": "GET"}, "http://a.test/", None),
        ({"http_proxy": "p", "REQUEST_METHOD": "GET"}, "http://a.test/", "http://p:80"),
        ({"HTTPS_PROXY": "p", "REQUEST_METHOD": "GET"}, "https://a.test/", "http://p:80"),
        ({"HTTP_PROXY": "p", "REQUEST_METHOD": ""}, "http://a.test/", "http://p:80"),
        ({"NO_PROXY": "a.test", "http_proxy": "p"}, "http://a.test/", None),
        ({"NO_PROXY": "a.test", "no_proxy": "b.test", "http_proxy": "p"}, "http://a.test/", "http://p:80"),
    ],
)
def test_which_variable_counts(environment: dict[str, str], url: str, proxy: str | None) -> None:
    found = proxy_for(Url.parse(url), environment)
    assert (str(found) if found else None) == proxy


@pytest.mark.parametrize(
    ("value", "login"),
    [
        ("user:password@p", "user:password"),
        ("http://user@p:1", "user:"),
        ("https://us%40er:p%3Aa%2Fss%20word@p", "us@er:p:a/ss word"),
        ("http://user:a@b@p:1", "user:a@b"),
        ("http://gr%C3%BC%C3%9Fe:%E2%82%AC@p", "grüße:€"),
    ],
)
def test_user_and_password_of_a_proxy(value: str, login: str) -> None:
    found = proxy_for(Url.parse("http://a.test/"), {"http_proxy": value})
    assert found is not None
    assert base64.b64decode(found.authorization.removeprefix("Basic ")).decode() == login
    assert "@" not in str(found)


@pytest.mark.parametrize(
    "value", ["http://user:pa#ss@p:80", "http://user:pa/ss@p", "socks5://user:pass@p", "user:pass@p:pass"]
)
def test_no_error_shows_a_proxy_s_password(value: str) -> None:
    with pytest.raises(RegistryError, match=r"\$http_proxy") as raised:
        proxy_for(Url.parse("http://a.test/"), {"http_proxy": value})
    assert "pa" not in said(raised.value).replace("password", "")


# Go's tables (golang.org/x/net/http/httpproxy), at port 80.
GO = (
    "foobar.com, .barbaz.net, *.wildcard.io, 192.168.1.1, 192.168.1.2:81, 192.168.1.3:80, 10.0.0.0/30, "
    "2001:db8::52:0:1, [2001:db8::52:0:2]:443, [2001:db8::52:0:3]:80, 2002:db8:a::45/64"
)
# And curl's (unit test 1614), but for one: there, `.example.com` means example.com as well.
MATCHES = [
    *((GO, host, True) for host in ("localhost", "127.0.0.1", "127.0.0.2", "::1", "192.168.1.1")),
    *((GO, host, True) for host in ("192.168.1.3", "10.0.0.2", "2001:db8::52:0:1", "2001:db8::52:0:3")),
    *((GO, host, True) for host in ("2002:db8:a::123", "www.barbaz.net", "foobar.com", "www.foobar.com")),
    *((GO, host, True) for host in ("nested.wildcard.io",)),
    *((GO, host, False) for host in ("::2", "192.168.1.2", "192.168.1.4", "2001:db8::52:0:2")),
    *((GO, host, False) for host in ("fe80::424b:c8be:1643:a1b6", "barbaz.net", "foofoobar.com", "baz.com")),
    *((GO, host, False) for host in ("localhost.net", "barbarbaz.net", "wildcard.io", "awildcard.io")),
    *(("*", host, True) for host in ("baz.com", "192.168.1.4", "::2")),
    ("example.com", "example.com", True),
    (".example.com", "example.com", False),
    ("ample.com", "example.com", False),
    ("example.com", "foo.example.com", True),
    (".foo.com", "example.com", False),
    (".示例.com", "www.xn--fsq092h.com", True),
    ("示例.com", "xn--fsq092h.com", True),
    (":1", "example.com", False),
    ("", "example.com", False),
    (",,/,/8,[,]:,*.,.,:", "example.com", False),
    ("localhost,.example.com,.example.de", "www.example.com", True),
    ("localhost,.example.com,.example.de", "www.example.com.", True),
    ("localhost,.example.com.,.example.de", "www.example.com", True),
    ("localhost,www.example.com.,.example.de", "www.example.com", True),
    ("localhost,example.com,.example.de", "example.com.", True),
    ("foobar", "foobar", True),
    ("barfoo", "foobar", False),
    ("foobar", "192.168.0.1", False),
    ("192.168.0.0/16", "192.168.0.1", True),
    ("192.168.0.0/24", "192.168.0.1", True),
    ("192.168.0.0/32", "192.168.0.1", False),
    ("192.168.0.0", "192.168.0.1", False),
    ("192.168.0.0/24", "192.168.1.1", False),
    ("192.168.0.99/24", "192.168.0.1", True),
    ("foo, bar, 192.168.0.0/16", "192.168.1.1", True),
    ("foo, bar, ::1/64", "bar", True),
    ("FOO,,,,,              BAr, ::1/64", "bar", True),
    ("foo, .example.com", "www.example.com", True),
    ("www2.example.com, .example.net", "www.example.com", False),
    (".example.com, .example.net", "nonexample.com", False),
    ("10.0.0.0/8", "2001:db8::1", False),
    ("10.0.0.0/8", "::ffff:10.1.2.3", True),
    ("10.1.2.3", "::ffff:10.1.2.3", True),
    ("example.com:80", "www.example.com", True),
    ("example.com:443", "www.example.com", False),
    ("*.example.com:80", "www.example.com", True),
    ("[2001:db8::1]", "2001:db8::1", True),
    ("1.1", "192.168.1.1", False),
    ("*example.com", "www.example.com", False),
]


@pytest.mark.parametrize(("no_proxy", "host", "is_direct"), MATCHES)
def test_no_proxy_as_go_and_curl_have_it(no_proxy: str, host: str, is_direct: bool) -> None:
    url = Url(scheme="http", host=host, port=80, target="/")
    found = proxy_for(url, {"http_proxy": "p", "no_proxy": no_proxy})
    assert found == (None if is_direct else Found(scheme="http", host="p", port=80))
