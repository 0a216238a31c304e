# SPDX-License-Identifier: Apache-2.0
"""registries.conf: which entry counts, where it leads, and that nothing else goes without TLS."""

from pathlib import Path

import pytest
from msgspec import structs

from oci.layout import Layout
from oci.registry import access as accesses
from oci.registry import registries_conf
from oci.registry.registries_conf import Location
from oci.registry.repository import Repository
from rekindle.errors import RegistryError, UsageError
from tests.conftest import free_port
from tests.samples.registry import Sample, access_to, assert_all_there, named, pull
from tests.servers.registry.access import Auth
from tests.servers.registry.relay import Authority, Tls
from tests.servers.registry.simulator import Registry

pytestmark = pytest.mark.usefixtures("small_stretches")


@pytest.fixture
def conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.delenv("CONTAINERS_REGISTRIES_CONF", raising=False)
    monkeypatch.setattr(registries_conf, "_SYSTEM", tmp_path / "etc")
    (tmp_path / "etc/registries.conf.d").mkdir(parents=True)
    return tmp_path / "etc/registries.conf"


def place(name: str) -> str:
    found = registries_conf.find(name)
    assert found is not None
    return f"{found.origin.host}/{found.origin.repository}"


def test_without_files_there_is_nothing(conf: Path) -> None:
    assert registries_conf.find("a.example/x") is None
    conf.write_text('unqualified-search-registries = ["docker.io"]\nshort-name-mode = "enforcing"\n')
    assert registries_conf.find("a.example/x") is None


def test_the_longest_prefix_counts_and_the_location_takes_its_place(conf: Path) -> None:
    conf.write_text("""
[[registry]]
location = "a.example"
[[registry]]
prefix = "a.example/team"
location = "b.example:5000/mirror/of"
[[registry]]
prefix = "*.wild.example"
insecure = true
[[registry]]
prefix = "a.example/evil"
blocked = true
""")
    assert place("a.example/x") == "a.example/x"
    assert place("a.example/team/x") == "b.example:5000/mirror/of/x"
    assert place("a.example/teams/x") == "a.example/teams/x"
    assert registries_conf.find("aa.example/x") is None
    assert registries_conf.find("wild.example/x") is None
    assert place("one.wild.example/x") == "one.wild.example/x"
    with pytest.raises(UsageError, match="blocked"):
        registries_conf.find("a.example/evil/x")


def test_mirrors_get_the_rest_of_the_name(conf: Path) -> None:
    conf.write_text("""
[[registry]]
prefix = "docker.io"
location = "docker.io"
[[registry.mirror]]
location = "m1.example/hub"
[[registry.mirror]]
location = "m2.example"
insecure = true
pull-from-mirror = "digest-only"
[[registry.mirror]]
location = "m3.example"
pull-from-mirror = "tag-only"
""")
    found = registries_conf.find("docker.io/library/x")
    assert found is not None
    assert found.mirrors == [
        Location(host="m1.example", repository="hub/library/x", insecure=False),
        Location(host="m2.example", repository="library/x", insecure=True),
    ]


def test_which_files_are_read(conf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def entry(location: str) -> str:
        return f'[[registry]]\nprefix = "a.example"\nlocation = "{location}"\n'

    conf.write_text(entry("etc.example"))
    assert place("a.example/x") == "etc.example/x"
    (tmp_path / ".config/containers").mkdir(parents=True)
    (tmp_path / ".config/containers/registries.conf").write_text(entry("own.example"))
    assert place("a.example/x") == "own.example/x"
    (conf.parent / "registries.conf.d/1.conf").write_text(entry("one.example"))
    (conf.parent / "registries.conf.d/2.conf").write_text(entry("two.example"))
    assert place("a.example/x") == "two.example/x"
    (tmp_path / "named.conf").write_text(entry("named.example"))
    monkeypatch.setenv("CONTAINERS_REGISTRIES_CONF", str(tmp_path / "named.conf"))
    (conf.parent / "registries.conf.d/2.conf").unlink()
    (conf.parent / "registries.conf.d/1.conf").unlink()
    assert place("a.example/x") == "named.example/x"


@pytest.mark.parametrize(
    "content",
    ["[[registry", "[registry]\n", "registry = 5", "[[registry]]\n", "[[registry]]\nlocation = 5\n"],
)
def test_a_file_that_cannot_be_used_is_named(conf: Path, content: str) -> None:
    conf.write_text(content)
    with pytest.raises(UsageError, match=r"registries\.conf"):
        registries_conf.find("a.example/x")


# With registries.


def write(conf: Path, registry: str, *, insecure: bool = False, mirror: str = "", location: str = "") -> None:
    lines = ["[[registry]]", f'prefix = "{registry}"', f'location = "{location or registry}"']
    lines += ["insecure = true"] if insecure else []
    lines += ["[[registry.mirror]]", f'location = "{mirror}"'] if mirror else []
    conf.write_text("\n".join(lines))


def test_a_mirror_is_asked_by_its_own_name_for_the_repository(
    conf: Path, sample: Sample, tmp_path: Path
) -> None:
    with Registry() as registry, Registry(auth=Auth.TOKEN) as mirror:
        sample.serve(registry)
        sample.serve(mirror, "of/team/b")
        write(conf, f"{registry.host}/a", mirror=f"{mirror.host}/of/team")
        target = Layout.create(tmp_path / "target")
        pull(f"{registry.host}/a/b:1", target, access_to())
        assert_all_there(target, sample.root, sample)
        assert not registry.downloads()
        assert mirror.downloads(sample.big.digest)
        # What the configuration file or the command line names comes first.
        pull(
            f"{registry.host}/a/b:1", Layout.create(tmp_path / "other"), access_to(f"http://{registry.host}")
        )
        assert registry.downloads()


def test_a_location_takes_the_place_of_the_registry(conf: Path, sample: Sample, tmp_path: Path) -> None:
    with Registry() as registry:
        sample.serve(registry, "moved/b")
        write(conf, "registry.invalid/a", location=f"{registry.host}/moved")
        target = Layout.create(tmp_path / "target")
        pull("registry.invalid/a/b:1", target, access_to())
        assert_all_there(target, sample.root, sample)


def test_only_what_is_named_as_insecure_goes_without_verified_tls(
    conf: Path, sample: Sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accesses, "is_loopback", lambda _: False)  # the registries here are
    authority = Authority(tmp_path / "authority")
    with Registry() as registry, Tls(authority.issue("elsewhere.test"), registry.host) as front:
        sample.serve(registry)
        for number, host in enumerate((registry.host, f"127.0.0.1:{front.port}")):
            write(conf, host)
            with pytest.raises(RegistryError):
                pull(f"{host}/a/b:1", Layout.create(tmp_path / f"no{number}"), access_to())
            write(conf, host, insecure=True)
            target = Layout.create(tmp_path / f"yes{number}")
            pull(f"{host}/a/b:1", target, access_to())
            assert_all_there(target, sample.root, sample)
        # The command line and the configuration file come first.
        strict = structs.replace(access_to(), plain_http=False)
        with pytest.raises(RegistryError, match="cannot be reached"):
            pull(f"{host}/a/b:1", Layout.create(tmp_path / "strict"), strict)


def test_an_insecure_registry_that_cannot_be_reached_is_said_to_be(conf: Path) -> None:
    host = f"127.0.0.1:{free_port()}"
    write(conf, host, insecure=True)
    with Repository(named(f"{host}/a/b"), access_to()) as repository, pytest.raises(RegistryError):
        repository.resolve()
