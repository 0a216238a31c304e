# SPDX-License-Identifier: Apache-2.0
"""Mirrors: who is asked, and what comes of it when a mirror misbehaves. Each row is one misbehaviour."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from msgspec import structs

from oci.layout import Layout
from oci.registry.repository import Repository
from rekindle.config import RegistrySettings
from rekindle.errors import (
    UsageError,
)
from tests.samples.registry import (
    Make,
    Sample,
    access_to,
    assert_all_there,
    named,
    parametrize,
    pull,
    sent,
    within,
)
from tests.servers.registry import misbehaviour as wrong
from tests.servers.registry.access import Auth
from tests.servers.registry.misbehaviour import ANYTHING, blob, manifest
from tests.servers.registry.simulator import Registry
from tests.servers.registry.wire import Kind

pytestmark = pytest.mark.usefixtures("small_stretches")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mirror:
    """All goes well, whatever a mirror does. `look` sees the mirror, then the registry."""

    name: str
    make: Make = lambda _: []
    serves: bool = True
    seconds: float = 3.0
    look: Callable[[Registry, Registry, Sample], None] = lambda *_: None


def all_from_mirror(mirror: Registry, registry: Registry, _: Sample) -> None:
    # What the tag means, and what is attached to the image: both are claims, and no digest judges them.
    assert {r.kind for r in registry.requests} <= {Kind.MANIFEST, Kind.REFERRERS}
    assert all(r.query["ns"] == registry.host for r in mirror.requests)


def all_from_registry(mirror: Registry, registry: Registry, sample: Sample) -> None:
    assert sent(registry, sample) == sample.big.size


def little_waiting(mirror: Registry, registry: Registry, sample: Sample) -> None:
    assert len(mirror.downloads()) <= 8  # and then no more


MIRRORS = [
    Mirror(name="nothing is wrong", look=all_from_mirror),
    Mirror(name="redirects", make=lambda _: [wrong.redirects(blob())]),
    Mirror(name="wrong bytes", make=lambda s: [wrong.wrong_bytes(s.big.digest)], look=all_from_registry),
    Mirror(name="wrong bytes, small", make=lambda s: [wrong.wrong_bytes(s.small.digest)]),
    Mirror(name="too many bytes", make=lambda s: [wrong.too_many_bytes(s.big.digest)]),
    Mirror(
        name="too many bytes in chunks",
        make=lambda s: [wrong.chunked(blob()), wrong.too_many_bytes(s.small.digest)],
    ),
    Mirror(name="another manifest", make=lambda s: [wrong.other_manifest(s.manifest.digest, b"{}")]),
    Mirror(name="a manifest that is no JSON", make=lambda _: [wrong.answers(manifest(), b"\0")]),
    Mirror(name="down", serves=False, look=all_from_registry),
    Mirror(name="lacks all", make=lambda _: [wrong.status(404, on=ANYTHING)], look=all_from_registry),
    Mirror(
        name="lacks a blob",
        make=lambda s: [wrong.status(404, on=blob(s.small.digest))],
        look=lambda m, r, s: assert_only(r, s.small.digest),
    ),
    Mirror(name="fails", make=lambda _: [wrong.status(503, on=ANYTHING)], look=little_waiting, seconds=1),
    Mirror(name="asks for an hour", make=lambda _: [wrong.status(429, on=blob(), retry_after=3600)]),
    Mirror(name="asks for a password", make=lambda _: [wrong.unauthorized()]),
    Mirror(
        name="stalls",
        make=lambda _: [wrong.stalls(ANYTHING, after_bytes=-1)],
        look=little_waiting,
        seconds=2,
    ),
    Mirror(
        name="stalls in the body",
        make=lambda _: [wrong.stalls(blob(), after_bytes=100)],
        look=little_waiting,
        seconds=3,
    ),
    Mirror(
        name="stalls midway",
        make=lambda _: [wrong.stalls(blob(), after_bytes=100, skip=5)],
        look=lambda m, r, s: assert_shared(m, r, s),
    ),
    Mirror(name="breaks midway", make=lambda _: [wrong.closes(blob(), after_bytes=100, skip=5)]),
    Mirror(
        name="wrong bytes, then breaks",
        make=lambda s: [wrong.wrong_bytes(s.big.digest, at=0), wrong.closes(blob(), after_bytes=100, skip=2)],
    ),
    Mirror(name="no ranges", make=lambda _: [wrong.ignores_range()]),
    Mirror(name="no ranges midway", make=lambda _: [wrong.ignores_range(skip=4)]),
    Mirror(name="a redirect to a file", make=lambda _: [wrong.redirects(blob(), to="file:///etc/passwd")]),
    Mirror(name="a redirect to nobody", make=lambda _: [wrong.redirects(blob(), to="http://127.0.0.1:1/")]),
]


def assert_only(registry: Registry, digest: str) -> None:
    assert {r.reference for r in registry.downloads()} == {digest}


def assert_shared(mirror: Registry, registry: Registry, sample: Sample) -> None:
    assert 0 < sent(registry, sample) < sample.big.size


@parametrize(MIRRORS)
def test_a_pull_by_way_of_a_mirror(case: Mirror, sample: Sample, tmp_path: Path) -> None:
    target = Layout.create(tmp_path)
    with Registry(auth=Auth.TOKEN) as registry, Registry(misbehave=case.make(sample)) as mirror:
        sample.serve(registry)
        sample.serve(mirror, tag=None)
        mirror.add_image("a/b", "1", b"what the tag meant once")
        if not case.serves:
            mirror.pause()
        registry.misbehave(wrong.tokens_expire(after=100))
        with within(case.seconds):
            pull(f"{registry.host}/a/b:1", target, access_to(f"http://{mirror.host}"))
        assert_all_there(target, sample.root, sample)
        assert mirror.leaks == registry.leaks == []
        assert not mirror.asked("GET", Kind.MANIFEST, "1")
        assert {r.method for r in mirror.requests} <= {"GET"}
        asked = [r for r in registry.requests if r.kind is not Kind.TOKEN and r.status != 401]
        registry.requests = asked
        case.look(mirror, registry, sample)
        password = [r for r in mirror.requests if "authorization" in r.headers]
        assert not password or case.name == "asks for a password"


def test_a_mirror_of_the_configuration_is_the_second(sample: Sample, tmp_path: Path) -> None:
    with Registry() as registry, Registry() as first, Registry() as second:
        sample.serve(registry)
        sample.serve(second, tag=None)
        settings = RegistrySettings(mirrors=(f"http://{second.host}",))
        access = access_to(f"http://{first.host}")
        access = structs.replace(
            access, config=structs.replace(access.config, registries={registry.host: settings})
        )
        pull(f"{registry.host}/a/b:1", Layout.create(tmp_path), access)
        assert not registry.downloads()
        assert first.downloads()
        assert len(second.downloads(sample.small.digest)) == 1


@pytest.mark.parametrize("url", ["127.0.0.1:5000", "ftp://a", "http://", "http://a?b", "http://u:p@a"])
def test_what_is_no_mirror(url: str) -> None:
    with pytest.raises(UsageError, match="is not a mirror"):
        Repository(named("127.0.0.1:5000/a/b"), access_to(url))
