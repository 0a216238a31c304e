# SPDX-License-Identifier: Apache-2.0
"""TLS to registries: who is trusted, which certificate is shown, and what is said of files that are wrong."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec import structs

from oci.layout import Layout
from oci.registry.access import Access
from oci.registry.certificates import Certificates
from rekindle.config import RegistrySettings
from rekindle.errors import RegistryError, UsageError
from tests.samples.registry import Sample, access_to, assert_all_there, pull, push, said, within
from tests.servers.registry import misbehaviour as wrong
from tests.servers.registry.misbehaviour import blob
from tests.servers.registry.relay import Authority, Pair, Proxy, Tls
from tests.servers.registry.simulator import Registry

pytestmark = pytest.mark.usefixtures("small_stretches")


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "authority")


@pytest.fixture
def registry(sample: Sample) -> Iterator[Registry]:
    with Registry() as registry:
        sample.serve(registry)
        yield registry


def tls(*certs_d: Path, **settings: RegistrySettings) -> Access:
    """An access that speaks TLS to loopback, too; settings are by host, with _ for dots and colons."""
    access = access_to()
    access = structs.replace(access, certs_d=certs_d, plain_http=False)
    return structs.replace(access, config=structs.replace(access.config, registries=settings))


def put(directory: Path, pair: Pair | None = None, *, ca: Path | None = None, name: str = "client") -> None:
    directory.mkdir(parents=True, exist_ok=True)
    if ca is not None:
        shutil.copy(ca, directory / "ca.crt")
    if pair is not None:
        shutil.copy(pair.certificate, directory / f"{name}.cert")
        shutil.copy(pair.key, directory / f"{name}.key")


def test_a_client_certificate_of_certs_d_is_shown(
    sample: Sample, registry: Registry, authority: Authority, tmp_path: Path
) -> None:
    target = Layout.create(tmp_path / "layout")
    pair, client = authority.issue("127.0.0.1"), authority.issue("node-7")
    with Tls(pair, registry.host, clients=authority.certificate) as front:
        put(tmp_path / front.host, client, ca=authority.certificate)
        access = tls(tmp_path)
        pull(f"{front.host}/a/b:1", target, access)
        assert_all_there(target, sample.root, sample)
        push(sample, f"{front.host}/c/d:1", access)
    assert registry.repositories["c/d"].tags["1"] == sample.root.digest
    assert set(front.shown) == {"node-7"}


@pytest.mark.parametrize("shown", ["", "of another authority"])
def test_without_the_right_client_certificate_nothing_is_read(
    shown: str, registry: Registry, authority: Authority, tmp_path: Path
) -> None:
    other = Authority(tmp_path / "other", "other")
    with Tls(authority.issue("127.0.0.1"), registry.host, clients=authority.certificate) as front:
        put(tmp_path / front.host, other.issue("node-7") if shown else None, ca=authority.certificate)
        with within(3), pytest.raises(RegistryError, match="cannot be reached") as raised:
            pull(f"{front.host}/a/b:1", Layout.create(tmp_path / "layout"), tls(tmp_path))
    assert not registry.requests
    assert "client certificate" in raised.value.hint


def test_the_configuration_goes_before_certs_d(
    sample: Sample, registry: Registry, authority: Authority, tmp_path: Path
) -> None:
    target = Layout.create(tmp_path / "layout")
    ours, theirs = authority.issue("ours"), authority.issue("theirs")
    with Tls(authority.issue("127.0.0.1"), registry.host, clients=authority.certificate) as front:
        put(tmp_path / front.host, theirs, ca=Authority(tmp_path / "other", "other").certificate)
        settings = RegistrySettings(
            ca_file=authority.certificate, cert_file=ours.certificate, key_file=ours.key
        )
        access = tls(tmp_path)
        access = structs.replace(
            access, config=structs.replace(access.config, registries={front.host: settings})
        )
        pull(f"{front.host}/a/b:1", target, access)
    assert_all_there(target, sample.root, sample)
    assert set(front.shown) == {"ours"}


@pytest.mark.parametrize("trusted", ["authority", "intermediate"])
def test_an_intermediate_authority_may_be_trusted_by_itself(
    trusted: str, registry: Registry, authority: Authority, tmp_path: Path
) -> None:
    intermediate = Authority(tmp_path / "between", "between", parent=authority)
    pair = intermediate.issue("127.0.0.1")
    pair.certificate.write_bytes(pair.certificate.read_bytes() + intermediate.certificate.read_bytes())
    with Tls(pair, registry.host) as front:
        ca = authority if trusted == "authority" else intermediate
        put(tmp_path / front.host, ca=ca.certificate)
        pull(f"{front.host}/a/b:1", Layout.create(tmp_path / "layout"), tls(tmp_path))


def test_a_certificate_for_another_name_is_not_trusted(
    registry: Registry, authority: Authority, tmp_path: Path
) -> None:
    with Tls(authority.issue("registry.test"), registry.host) as front:
        put(tmp_path / front.host, ca=authority.certificate)
        with within(2), pytest.raises(RegistryError, match="cannot be reached") as raised:
            pull(f"{front.host}/a/b:1", Layout.create(tmp_path / "layout"), tls(tmp_path))
    assert "ca_file" in raised.value.hint
    assert not registry.requests


def test_a_redirect_does_not_take_the_certificate_along(
    sample: Sample, registry: Registry, authority: Authority, tmp_path: Path
) -> None:
    target = Layout.create(tmp_path / "layout")
    with (
        Tls(authority.issue("127.0.0.1"), registry.elsewhere) as storage,
        Tls(authority.issue("127.0.0.1"), registry.host, clients=authority.certificate) as front,
    ):
        registry.misbehave(wrong.redirects(blob(), to=f"https://{storage.host}/v2/"))
        put(tmp_path / front.host, authority.issue("node-7"), ca=authority.certificate)
        put(tmp_path / storage.host, ca=authority.certificate)
        with pytest.raises(RegistryError):  # there is nothing at that path: it is the way that counts
            pull(f"{front.host}/a/b:1", target, tls(tmp_path))
        assert storage.accepted
    assert set(front.shown) == {"node-7"}
    assert storage.shown == []


@pytest.mark.parametrize("tunnel", [False, True])
@pytest.mark.parametrize("after_bytes", [-1, 100])
def test_what_stalls_over_tls_is_asked_for_again(
    after_bytes: int,
    tunnel: bool,
    sample: Sample,
    registry: Registry,
    authority: Authority,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Through a tunnel of a TLS proxy, it is TLS within TLS."""
    target = Layout.create(tmp_path / "layout")
    registry.misbehave(wrong.stalls(blob(sample.big.digest), after_bytes=after_bytes, times=2))
    name = "registry.test"
    with (
        Tls(authority.issue("127.0.0.1", name), registry.host) as front,
        Proxy({f"{name}:443": front.host}) as proxy,
        Tls(authority.issue("127.0.0.1"), proxy.host) as tls_proxy,
    ):
        for host in (front.host, name, tls_proxy.host):
            put(tmp_path / host, ca=authority.certificate)
        if tunnel:
            monkeypatch.setenv("https_proxy", f"https://{tls_proxy.host}")
        with within(5):
            pull(f"{name if tunnel else front.host}/a/b:1", target, tls(tmp_path))
        assert bool(proxy.accepted) is tunnel
    assert_all_there(target, sample.root, sample)


# Which files are read.


def context_of(authority: Authority, *directories: Path, host: str = "a.test", port: int = 443) -> list[str]:
    """The common names of the authorities that the context of a host trusts, but for the system's."""
    context = Certificates({}, directories).context(host, port)
    return [name for name in ("one", "two") if f"'{name}'" in str(context.get_ca_certs())]


@pytest.mark.parametrize(
    ("directory", "host", "port", "is_read"),
    [
        ("a.test", "a.test", 443, True),
        ("a.test:443", "a.test", 443, True),
        ("a.test", "a.test", 5000, False),
        ("a.test:5000", "a.test", 5000, True),
        ("a.test:5000", "a.test", 443, False),
        ("b.test", "a.test", 443, False),
        ("[::1]:5000", "::1", 5000, True),
    ],
)
def test_the_directory_of_a_host(directory: str, host: str, port: int, is_read: bool, tmp_path: Path) -> None:
    authority = Authority(tmp_path / "made", "one")
    put(tmp_path / "certs.d" / directory, ca=authority.certificate)
    found = context_of(authority, tmp_path / "certs.d", host=host, port=port)
    assert found == (["one"] if is_read else [])


def test_the_first_directory_that_there_is_counts(tmp_path: Path) -> None:
    one, two = Authority(tmp_path / "made", "one"), Authority(tmp_path / "made", "two")
    put(tmp_path / "containers" / "a.test", ca=one.certificate)
    put(tmp_path / "docker" / "a.test", ca=two.certificate)
    assert context_of(one, tmp_path / "containers", tmp_path / "docker") == ["one"]
    assert context_of(one, tmp_path / "absent", tmp_path / "docker") == ["two"]
    shutil.copy(two.certificate, tmp_path / "containers" / "a.test" / "more.crt")
    assert sorted(context_of(one, tmp_path / "containers", tmp_path / "docker")) == ["one", "two"]


def test_authorities_of_certs_d_come_on_top_of_those_of_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    system, own = Authority(tmp_path / "made", "one"), Authority(tmp_path / "made", "two")
    monkeypatch.setenv("SSL_CERT_FILE", str(system.certificate))
    put(tmp_path / "certs.d" / "a.test", ca=own.certificate)
    assert sorted(context_of(own, tmp_path / "certs.d")) == ["one", "two"]
    settings = {"a.test": RegistrySettings(ca_file=own.certificate)}
    assert len(Certificates(settings, ()).context("a.test", 443).get_ca_certs()) == 1


@pytest.mark.parametrize("missing", ["key", "cert"])
def test_half_of_a_pair_is_an_error(missing: str, authority: Authority, tmp_path: Path) -> None:
    put(tmp_path / "a.test", authority.issue("node-7"))
    (tmp_path / "a.test" / f"client.{missing}").unlink()
    with pytest.raises(UsageError, match=r"has no (key|client certificate)") as raised:
        Certificates({}, [tmp_path]).context("a.test", 443)
    assert f"client.{missing}" in said(raised.value)


def test_of_several_certificates_the_first_by_name_is_shown(
    registry: Registry, authority: Authority, tmp_path: Path
) -> None:
    with Tls(authority.issue("127.0.0.1"), registry.host, clients=authority.certificate) as front:
        put(tmp_path / front.host, authority.issue("second"), ca=authority.certificate, name="b")
        put(tmp_path / front.host, authority.issue("first"), name="a")
        pull(f"{front.host}/a/b:1", Layout.create(tmp_path / "layout"), tls(tmp_path))
    assert set(front.shown) == {"first"}


def test_an_encrypted_key_is_refused_and_not_asked_about(authority: Authority, tmp_path: Path) -> None:
    put(tmp_path / "a.test", authority.issue("node-7", password="secret"))
    with within(2), pytest.raises(UsageError, match="is encrypted"):
        Certificates({}, [tmp_path]).context("a.test", 443)


@pytest.mark.parametrize("content", [b"", b"nonsense", b"-----BEGIN CERTIFICATE-----\nAAAA\n"])
@pytest.mark.parametrize("name", ["ca.crt", "client.cert", "client.key"])
def test_a_file_that_is_not_what_its_name_says_is_named(
    name: str, content: bytes, authority: Authority, tmp_path: Path
) -> None:
    put(tmp_path / "a.test", authority.issue("node-7"), ca=authority.certificate)
    (tmp_path / "a.test" / name).write_bytes(content)
    with pytest.raises(UsageError) as raised:
        Certificates({}, [tmp_path]).context("a.test", 443)
    assert str(tmp_path / "a.test" / name) in said(raised.value)


def test_a_key_of_another_certificate_is_refused(authority: Authority, tmp_path: Path) -> None:
    put(tmp_path / "a.test", authority.issue("node-7"))
    shutil.copy(authority.issue("node-8").key, tmp_path / "a.test" / "client.key")
    with pytest.raises(UsageError, match="as a client certificate"):
        Certificates({}, [tmp_path]).context("a.test", 443)


def test_a_file_of_the_configuration_that_is_not_there_is_named(tmp_path: Path) -> None:
    settings = {"a.test": RegistrySettings(ca_file=tmp_path / "absent.pem")}
    with pytest.raises(UsageError, match=r"absent\.pem") as raised:
        Certificates(settings, ()).context("a.test", 443)
    assert 'registry."a.test"' in raised.value.hint


def test_a_context_is_made_once_for_a_host(tmp_path: Path) -> None:
    certificates = Certificates({}, ())
    assert certificates.context("a.test", 443) is certificates.context("a.test", 443)
    assert certificates.context("a.test", 443) is not certificates.context("b.test", 443)
