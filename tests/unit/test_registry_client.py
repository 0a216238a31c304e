# SPDX-License-Identifier: Apache-2.0
"""What comes of a pull or push when a registry misbehaves: right bytes, or an error that says so, in time.

Each row of the tables is one misbehaviour. Whatever it is, nothing that was not verified may be seen, nobody
but the registry may learn the password, no thread may stay, and another try must need no more than what is
missing.
"""

import contextlib
import json
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from oci import media_types, transfer
from oci.descriptor import Descriptor
from oci.layout import Layout
from oci.progress import Limiter, Tally
from oci.reference import RegistryReference, parse
from oci.registry import download
from oci.registry.credentials import Credentials
from oci.registry.repository import Access, Repository
from rekindle.config import Config, Limits, Patience, RegistrySettings
from rekindle.digest import Digest
from rekindle.errors import (
    CredentialsError,
    FormatError,
    IntegrityError,
    NotFoundError,
    RegistryError,
    RekindleError,
    UsageError,
)
from tests.conftest import free_port
from tests.servers.registry import misbehaviour as wrong
from tests.servers.registry.access import PASSWORD, USERNAME, Auth
from tests.servers.registry.misbehaviour import ANYTHING, MOUNT, REFERRERS, TOKEN, On, blob, manifest, upload
from tests.servers.registry.simulator import Misbehave, Registry, _Repository
from tests.servers.registry.wire import Answer, Ending, Kind, Request

STRETCH = 64 << 10
# Seconds may be fractions here; the file that users write has whole ones.
PATIENCE = Patience(
    jobs=4,
    connect_seconds=1,
    stall_seconds=0.5,  # type: ignore[arg-type]
    attempts=3,
    longest_wait_seconds=2,
)
CALM = replace(PATIENCE, stall_seconds=5)
RIGHT = Credentials(name=USERNAME, password=PASSWORD)
WRONG = Credentials(name=USERNAME, password="guessed")
BIG, SMALL = "big", "small"


@dataclass(frozen=True, slots=True)
class Sample:
    """An image in a layout: an index, a manifest, a layer of many stretches and tiny ones."""

    layout: Layout
    root: Descriptor
    manifest: Descriptor
    blobs: dict[str, Descriptor]

    @property
    def big(self) -> Descriptor:
        return self.blobs[BIG]

    @property
    def small(self) -> Descriptor:
        return self.blobs[SMALL]

    def content(self, descriptor: Descriptor) -> bytes:
        return self.layout.read(descriptor, limit_bytes=1 << 30)

    def serve(self, registry: Registry, repository: str = "a/b", tag: str | None = "1") -> None:
        """Puts it into a simulated registry."""
        for each in self.blobs.values():
            registry.add_blob(repository, self.content(each))
        for each, name in ((self.manifest, None), (self.root, tag)):
            registry.add_manifest(repository, self.content(each), name, each.media_type)


def make_sample(place: Path, seed: int = 0) -> Sample:
    layout = Layout.create(place)
    content = random.Random(seed)
    blobs = {
        BIG: layout.put(content.randbytes(12 * STRETCH + 777), "application/octet-stream"),
        SMALL: layout.put(content.randbytes(1000), "application/octet-stream"),
        "empty": layout.put(b"", "application/octet-stream"),
        "config": layout.put(b'{"seed": %d}' % seed, media_types.IMAGE_CONFIG),
    }
    layers = [blobs[name].to_json() for name in (BIG, SMALL, "empty")]
    document = {"schemaVersion": 2, "mediaType": media_types.MANIFEST, "config": blobs["config"].to_json()}
    inner = layout.put(json.dumps({**document, "layers": layers}).encode(), media_types.MANIFEST)
    index = {"schemaVersion": 2, "mediaType": media_types.INDEX, "manifests": [inner.to_json()]}
    root = layout.put(json.dumps(index).encode(), media_types.INDEX)
    return Sample(layout, root, inner, blobs)


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    return make_sample(tmp_path_factory.mktemp("sample"))


@pytest.fixture(autouse=True)
def small_stretches(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Blobs of many stretches that are small all the same; and no thread may outlive its transfer."""
    monkeypatch.setattr(download, "STRETCH_BYTES", STRETCH)
    yield
    deadline = time.monotonic() + 2
    while left := [t.name for t in threading.enumerate() if t.name.startswith(("download", "ThreadPool"))]:
        assert time.monotonic() < deadline, left
        time.sleep(0.01)


def access_to(
    *mirrors: str,
    patience: Patience = PATIENCE,
    credentials: Credentials | None = RIGHT,
    rate: float | None = None,
    limits: Limits | None = None,
) -> Access:
    return Access(
        config=Config(patience=patience, limits=limits or Limits()),
        tally=Tally(),
        limiter=Limiter(rate),
        mirrors=mirrors,
        find_credentials=lambda _: credentials,
    )


def named(text: str) -> RegistryReference:
    reference = parse(text)
    assert isinstance(reference, RegistryReference)
    return reference


def pull(reference: str, target: Layout, access: Access) -> Descriptor:
    with Repository(named(reference), access) as repository:
        root = repository.resolve()
        tree = transfer.explore(repository, root, access.config.limits)
        transfer.into_layout(repository, tree, target, "pulled", access)
        return root


def push(sample: Sample, reference: str, access: Access, *, mount_from: Sequence[str] = ()) -> None:
    tree = transfer.explore(sample.layout, sample.root, access.config.limits)
    transfer.into_registry(sample.layout, tree, named(reference), access, mount_from=mount_from)


def blobs_below(layout: Layout) -> set[str]:
    """The digests of what has come, staged or not; each is checked against its bytes."""
    found = set()
    for path in layout.root.rglob("blobs/sha256/*"):
        assert not path.name.startswith("."), f"{path} was left behind"
        assert Digest.of_file(path).hex == path.name
        found.add(f"sha256:{path.name}")
    return found


def assert_nothing_to_see(layout: Layout) -> None:
    assert layout.tags() == {}
    assert not list((layout.root / "blobs" / "sha256").iterdir())


def assert_all_there(layout: Layout, root: Descriptor, sample: Sample) -> None:
    assert layout.tags()["pulled"].digest == root.digest
    for each in (*sample.blobs.values(), sample.manifest, sample.root):
        assert layout.read(replace(each), limit_bytes=1 << 30) == sample.content(each)
    assert not (layout.root / ".incoming").exists()


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds


def expecting(error: type[RekindleError] | None, word: str) -> Any:
    return contextlib.nullcontext() if error is None else pytest.raises(error)


def said(error: RekindleError) -> str:
    return f"{error.message}\n{error.cause}\n{error.hint}"


Make = Callable[[Sample], list[Misbehave]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """`error` is None if all must go well. `look` sees the registry after the first try."""

    name: str
    make: Make = lambda _: []
    error: type[RekindleError] | None = None
    word: str = ""
    seconds: float = 3.0
    auth: Auth = Auth.NONE
    credentials: Credentials | None = RIGHT
    patience: Patience = PATIENCE
    options: dict[str, Any] = field(default_factory=dict)
    straggler_seconds: float = 10.0
    look: Callable[[Registry, Sample], None] = lambda *_: None
    reference: str = "a/b:1"


def parametrize(cases: list[Case]) -> Any:
    assert len({case.name for case in cases}) == len(cases)
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name.replace(" ", "-"))


def times_asked(most: int, kind: Kind) -> Callable[[Registry, Sample], None]:
    def look(registry: Registry, _: Sample) -> None:
        assert len(registry.asked(None, kind)) <= most, [str(r) for r in registry.requests]

    return look


def each_byte_once(registry: Registry, sample: Sample) -> None:
    assert sent(registry, sample) == sample.big.size


def sent(registry: Registry, sample: Sample) -> int:
    return sum(r.sent_bytes for r in registry.downloads(sample.big.digest) if r.status in {200, 206})


def at_most(factor: float) -> Callable[[Registry, Sample], None]:
    def look(registry: Registry, sample: Sample) -> None:
        assert sent(registry, sample) <= factor * sample.big.size

    return look


def shifted(asked: range) -> range:
    return range(asked.start - 1, asked.stop - 1)


def junk(content: bytes) -> Make:
    """The tag names this; unlike `other_manifest`, with a Docker-Content-Digest that is right."""

    def make(_: Sample) -> list[Misbehave]:
        headers = {"Content-Type": media_types.MANIFEST}
        return [wrong.answers(manifest("1"), content, headers=headers)]

    return make


def another_scope(value: str) -> Misbehave:
    """Challenges that are none."""

    def act(*_: object) -> Answer:
        return Answer(status=401, headers={"WWW-Authenticate": value})

    return wrong.Misbehaviour(on=manifest(), act=act)


PULLS = [
    Case(name="nothing is wrong", look=each_byte_once),
    # Content.
    Case(
        name="wrong bytes",
        make=lambda s: [wrong.wrong_bytes(s.big.digest)],
        error=IntegrityError,
        word="not those of its digest",
    ),
    Case(
        name="wrong bytes, first",
        make=lambda s: [wrong.wrong_bytes(s.big.digest, at=0)],
        error=IntegrityError,
        word="not those of its digest",
    ),
    Case(
        name="wrong bytes, small",
        make=lambda s: [wrong.wrong_bytes(s.small.digest)],
        error=IntegrityError,
        word="not those of its digest",
    ),
    Case(
        name="too many bytes",
        make=lambda s: [wrong.too_many_bytes(s.big.digest)],
        error=RegistryError,
        word="it sends",
    ),
    Case(
        name="too many bytes, small",
        make=lambda s: [wrong.too_many_bytes(s.small.digest)],
        error=RegistryError,
        word="should have 1000",
    ),
    Case(
        name="too many bytes in chunks",
        make=lambda s: [wrong.chunked(blob()), wrong.too_many_bytes(s.small.digest)],
        error=IntegrityError,
        word="longer",
    ),
    Case(
        name="too many bytes in chunks, no ranges",
        make=lambda s: [wrong.chunked(blob()), wrong.ignores_range(), wrong.too_many_bytes(s.big.digest)],
    ),  # what was to come has come by then, and is right
    Case(
        name="too few bytes",
        make=lambda s: [wrong.too_few_bytes(s.big.digest)],
        error=RegistryError,
        word="it sends",
    ),
    Case(
        name="too few bytes, small",
        make=lambda s: [wrong.too_few_bytes(s.small.digest)],
        error=RegistryError,
        word="should have 1000",
    ),
    Case(
        name="too few bytes in chunks",
        make=lambda s: [wrong.chunked(blob()), wrong.too_few_bytes(s.small.digest)],
        error=RegistryError,
        word="416",
    ),
    Case(name="in chunks", make=lambda _: [wrong.chunked(ANYTHING)], look=each_byte_once),
    Case(name="gzip", make=lambda _: [wrong.gzipped(blob())], error=RegistryError, word="encoded as gzip"),
    Case(
        name="another manifest under a digest",
        make=lambda s: [wrong.other_manifest(s.manifest.digest, s.content(s.manifest) + b" ")],
        error=IntegrityError,
        word="other bytes",
    ),
    Case(
        name="another manifest under the digest asked for",
        make=lambda s: [wrong.other_manifest(s.root.digest, b"{}")],
        reference="a/b@ROOT",
        error=IntegrityError,
        word="another manifest",
    ),
    Case(
        name="a manifest that is not that of its header",
        make=lambda _: [wrong.other_manifest("1", b"{}")],
        error=IntegrityError,
        word="another manifest",
    ),
    Case(name="a manifest that is no JSON", make=junk(b"\0nonsense"), error=FormatError, word="not JSON"),
    Case(name="a manifest that is a list", make=junk(b"[]"), error=FormatError, word="object"),
    Case(name="a manifest nested deeply", make=junk(b"[" * 100_000), error=FormatError, word="not JSON"),
    Case(
        name="a manifest of another type",
        make=junk(json.dumps({"mediaType": media_types.INDEX}).encode()),
        error=FormatError,
        word="something else",
    ),
    Case(
        name="a page for people",
        make=lambda _: [
            wrong.answers(manifest("1"), b"<html>sign in</html>", headers={"Content-Type": "text/html"})
        ],
        error=FormatError,
        word="not JSON",
    ),
    Case(
        name="a manifest of no type",
        make=lambda _: [wrong.answers(manifest("1"), b"{}", headers={"Content-Type": "text/plain"})],
        error=FormatError,
        word="no image",
    ),
    Case(
        name="a huge manifest",
        make=junk(bytes(5 << 20)),
        error=RegistryError,
        word="more than",
    ),
    Case(
        name="a huge manifest in chunks",
        make=lambda s: [wrong.chunked(manifest()), *junk(bytes(5 << 20))(s)],
        error=RegistryError,
        word="more than",
    ),
    Case(
        name="a manifest below that is longer than said",
        make=lambda s: [wrong.other_manifest(s.manifest.digest, bytes(1 << 20))],
        error=RegistryError,
        word="more than",
    ),
    Case(
        name="a huge header",
        make=lambda _: [wrong.header(manifest(), "X-Huge", "x" * 70_000)],
        error=RegistryError,
        word="cannot be reached",
    ),
    Case(
        name="a huge header of a blob",
        make=lambda s: [wrong.header(blob(s.big.digest), "X-Huge", "x" * 70_000, times=1)],
    ),
    Case(
        name="the tag moves",
        make=lambda _: [wrong.tag_moves("1", f"sha256:{0:064}", method="GET")],
    ),
    # Statuses.
    Case(
        name="403 for the manifest",
        make=lambda _: [wrong.status(403, on=manifest())],
        error=CredentialsError,
        word="does not allow",
        seconds=0.5,
        look=times_asked(1, Kind.MANIFEST),
    ),
    Case(
        name="403 for a blob",
        make=lambda s: [wrong.status(403, on=blob(s.big.digest))],
        error=CredentialsError,
        word="does not allow",
        seconds=1,
    ),
    Case(
        name="404 for the manifest",
        make=lambda _: [wrong.status(404, on=manifest())],
        error=NotFoundError,
        word="NAME_UNKNOWN",
        seconds=0.5,
        look=times_asked(1, Kind.MANIFEST),
    ),
    Case(
        name="404 for a blob",
        make=lambda s: [wrong.status(404, on=blob(s.small.digest))],
        error=NotFoundError,
        word="no such thing",
        seconds=1,
    ),
    Case(name="500 twice", make=lambda _: [wrong.status(500, on=blob(), times=2)]),
    Case(
        name="502 with a page",
        make=lambda _: [wrong.answers(manifest(), b"<html>bad gateway</html>", code=502)],
        error=RegistryError,
        word="502",
        look=times_asked(3, Kind.MANIFEST),
    ),
    Case(
        name="500 for ever",
        make=lambda s: [wrong.status(500, on=blob(s.small.digest))],
        error=RegistryError,
        word="500",
    ),
    Case(name="418", make=lambda _: [wrong.status(418, on=manifest())], error=RegistryError, word="418"),
    Case(name="429", make=lambda _: [wrong.status(429, on=ANYTHING, times=2)]),
    Case(
        name="429 with seconds",
        make=lambda _: [wrong.status(429, on=manifest(), retry_after=1, times=1)],
        look=lambda r, _: assert_pause(r, 1.0),
    ),
    Case(
        name="503 with a date",
        make=lambda _: [wrong.status(503, on=manifest(), retry_after=wrong.http_date(2), times=1)],
        seconds=4,
        look=lambda r, _: assert_pause(r, 0.5),
    ),
    Case(
        name="503 with a date that has passed",
        make=lambda _: [wrong.status(503, on=manifest(), retry_after=wrong.http_date(-60), times=1)],
        seconds=1,
    ),
    Case(
        name="429 that asks for an hour",
        make=lambda _: [wrong.status(429, on=manifest(), retry_after=3600)],
        error=RegistryError,
        word="left alone for 3600 s",
        seconds=0.5,
        look=times_asked(1, Kind.MANIFEST),
    ),
    Case(
        name="429 that asks for ages",
        make=lambda _: [wrong.status(429, on=blob(), retry_after="9" * 5000)],
        error=RegistryError,
        word="left alone",
        seconds=1,
    ),
    Case(
        name="429 that asks for nonsense",
        make=lambda _: [wrong.status(429, on=manifest(), retry_after="soon", times=1)],
        seconds=1,
    ),
    Case(
        name="429 of the storage",
        make=lambda _: [
            wrong.redirects(blob()),
            wrong.status(429, on=blob(elsewhere=True), retry_after=1, times=1),
        ],
    ),
    # Redirects.
    Case(
        name="redirects to another host",
        make=lambda _: [wrong.redirects(blob())],
        auth=Auth.TOKEN,
        look=each_byte_once,
    ),
    Case(name="302, and a password", make=lambda _: [wrong.redirects(blob(), 302)], auth=Auth.BASIC),
    Case(name="redirects of manifests", make=lambda _: [wrong.redirects(manifest())], auth=Auth.BASIC),
    Case(name="links that expire at once", make=lambda _: [wrong.redirects(blob(), expired=2)]),
    Case(
        name="links that expire midway",
        make=lambda s: [
            wrong.redirects(blob()),
            wrong.status(403, on=blob(s.big.digest, elsewhere=True), skip=3, times=2),
        ],
        auth=Auth.TOKEN,
    ),
    Case(
        name="links that never work",
        make=lambda _: [wrong.redirects(blob(), expired=10**6)],
        error=RegistryError,
        word="403",
    ),
    Case(
        name="a redirect loop",
        make=lambda s: [wrong.redirects(blob(s.big.digest), to="")],
        error=RegistryError,
        word="more than 5",
        seconds=1,
    ),
    *(
        Case(
            name=f"a redirect to {where}",
            make=lambda _, where=where: [wrong.redirects(blob(), to=where)],
            error=RegistryError,
            word="leads nowhere",
            seconds=1,
        )
        for where in (
            "file:///etc/passwd",
            "ftp://127.0.0.1/x",
            "http://user:word@127.0.0.1/",
            "http://a..b/",
            "http://[::1/",
            "http://127.0.0.1:99999/",
            f"http://{'a' * 64}.example/",
        )
    ),
    Case(
        name="a redirect to nobody",
        make=lambda _: [wrong.redirects(blob(), to="http://127.0.0.1:1/")],
        error=RegistryError,
        word="refused",
    ),
    Case(
        name="a redirect without Location",
        make=lambda _: [wrong.answers(blob(), code=307)],
        error=RegistryError,
        word="Location",
        seconds=1,
    ),
    # Ranges.
    Case(name="no ranges", make=lambda _: [wrong.ignores_range()], look=at_most(3)),
    Case(
        name="no ranges, in chunks",
        make=lambda _: [wrong.chunked(blob()), wrong.ignores_range()],
        look=at_most(3),
    ),
    Case(
        name="no ranges after some",
        make=lambda s: [wrong.ignores_range(blob(s.big.digest), skip=3)],
    ),
    Case(
        name="no ranges, and it breaks",
        make=lambda s: [
            wrong.ignores_range(),
            wrong.closes(blob(s.big.digest), after_bytes=5 * STRETCH, skip=1, times=2),
        ],
    ),
    Case(
        name="no ranges, and a small blob breaks",
        make=lambda s: [wrong.ignores_range(), wrong.closes(blob(s.small.digest), after_bytes=500, times=1)],
    ),
    Case(
        name="no ranges, wrong bytes",
        make=lambda s: [wrong.ignores_range(), wrong.wrong_bytes(s.big.digest)],
        error=IntegrityError,
        word="digest",
    ),
    Case(
        name="no ranges, 404 after all",
        make=lambda s: [
            wrong.status(404, on=blob(s.big.digest), skip=1),
            wrong.ignores_range(),
        ],
        error=NotFoundError,
        word="no such thing",
    ),
    Case(
        name="another range",
        make=lambda s: [wrong.another_range(blob(s.big.digest), shifted, lie=False, skip=2)],
        error=RegistryError,
        word="it sends",
    ),
    Case(
        name="another range, and a lie",
        make=lambda s: [wrong.another_range(blob(s.big.digest), shifted, lie=True, skip=2)],
        error=IntegrityError,
        word="digest",
    ),
    Case(
        name="Content-Range without a size",
        make=lambda _: [wrong.Misbehaviour(on=blob(), act=lambda q, go: any_size(go(q)))],
    ),
    Case(
        name="Content-Range missing",
        make=lambda _: [wrong.header(blob(), "Content-Range", None)],
        error=RegistryError,
        word="it sends",
    ),
    # Connections.
    Case(
        name="stalls before the headers",
        make=lambda s: [wrong.stalls(blob(s.big.digest), after_bytes=-1, times=1)],
    ),
    Case(name="stalls after the headers", make=lambda s: [wrong.stalls(blob(s.big.digest), times=1)]),
    Case(
        name="stalls in the body",
        make=lambda s: [wrong.stalls(blob(s.big.digest), after_bytes=20_000, times=2)],
        look=at_most(1),
    ),
    Case(
        name="stalls for ever",
        make=lambda s: [wrong.stalls(blob(s.big.digest), after_bytes=100)],
        error=RegistryError,
        word="stalls",
        seconds=4,
    ),
    Case(
        name="stalls before the headers for ever",
        make=lambda s: [wrong.stalls(blob(s.big.digest), after_bytes=-1)],
        error=RegistryError,
        word="in time",
        seconds=4,
    ),
    Case(
        name="stalls at once",
        make=lambda _: [wrong.stalls(manifest(), after_bytes=-1)],
        error=RegistryError,
        word="in time",
        seconds=1,
    ),
    Case(
        name="stalls in the manifest",
        make=lambda _: [wrong.stalls(manifest(), after_bytes=5, times=1)],
    ),
    Case(
        name="stalls in the manifest for ever",
        make=lambda _: [wrong.stalls(manifest(), after_bytes=5)],
        error=RegistryError,
        word="stalls",
    ),
    Case(name="drips", make=lambda s: [wrong.slow(blob(s.big.digest), 10, times=1)], seconds=3),
    Case(
        name="drips for ever",
        make=lambda s: [wrong.slow(blob(s.small.digest), 50)],
        error=RegistryError,
        word="stalls",
        seconds=4,
    ),
    Case(
        name="drips in chunks",
        make=lambda s: [wrong.chunked(blob()), wrong.slow(blob(s.big.digest), 10, times=1)],
        seconds=3,
    ),
    Case(
        name="breaks and breaks",
        make=lambda s: [wrong.closes(blob(s.big.digest), after_bytes=STRETCH // 2, times=12)],
        seconds=5,
        look=each_byte_once,
    ),
    Case(
        name="breaks in a small blob",
        make=lambda s: [wrong.closes(blob(s.small.digest), after_bytes=400, times=2)],
        look=lambda r, s: assert_ranges(r, s.small.digest, [None, "bytes=400-999", "bytes=800-999"]),
    ),
    Case(
        name="resets",
        make=lambda s: [wrong.resets(blob(s.big.digest), after_bytes=STRETCH // 2, times=4)],
        seconds=5,
    ),
    Case(
        name="resets for ever",
        make=lambda s: [wrong.resets(blob(s.small.digest), after_bytes=0)],
        error=RegistryError,
        word="3 times in a row",
    ),
    Case(
        name="breaks in chunks",
        make=lambda s: [wrong.chunked(blob()), wrong.closes(blob(s.big.digest), after_bytes=9000, times=2)],
    ),
    Case(name="hangs up after each answer", make=lambda _: [wrong.hangs_up(ANYTHING)]),
    Case(
        name="says close",
        make=lambda _: [wrong.header(ANYTHING, "Connection", "close")],
    ),
    Case(
        name="says close, and stalls",
        make=lambda s: [
            wrong.header(ANYTHING, "Connection", "close"),
            wrong.stalls(blob(s.big.digest), after_bytes=100, times=1),
        ],
    ),
    Case(
        name="announces more than it sends",
        make=lambda s: [wrong.content_length(blob(s.small.digest), 5)],
        error=RegistryError,
        word="should have",
    ),
    Case(name="restarts midway", make=lambda s: [wrong.restarts(blob(s.big.digest), 0.2, skip=3, times=1)]),
    Case(
        name="a straggler",
        make=lambda s: [wrong.slow(blob(s.big.digest), STRETCH / 20, skip=6, times=1)],
        patience=CALM,
        straggler_seconds=0.3,
        seconds=3,  # the straggler would take 20
    ),
    # Who we are.
    Case(name="a token", auth=Auth.TOKEN, look=times_asked(1, Kind.TOKEN)),
    Case(name="a password", auth=Auth.BASIC),
    Case(
        name="nobody's token",
        auth=Auth.TOKEN,
        credentials=None,
        options={"anonymous_pull": True},
    ),
    Case(
        name="tokens that expire midway",
        make=lambda _: [wrong.tokens_expire(after=4)],
        auth=Auth.TOKEN,
        look=each_byte_once,
    ),
    Case(name="tokens for a second", auth=Auth.TOKEN, options={"token_seconds": 1}),
    Case(
        name="no password",
        auth=Auth.BASIC,
        credentials=None,
        error=CredentialsError,
        word="docker login",
        seconds=0.5,
        look=times_asked(1, Kind.MANIFEST),
    ),
    Case(
        name="a wrong password",
        auth=Auth.BASIC,
        credentials=WRONG,
        error=CredentialsError,
        word="refuses the password",
        seconds=0.5,
        look=times_asked(2, Kind.MANIFEST),
    ),
    Case(
        name="a wrong password for a token",
        auth=Auth.TOKEN,
        credentials=WRONG,
        error=CredentialsError,
        word="docker login",
        seconds=0.5,
        look=times_asked(1, Kind.TOKEN),
    ),
    Case(
        name="no token for nobody",
        auth=Auth.TOKEN,
        credentials=None,
        error=CredentialsError,
        word="has none",
        seconds=0.5,
        look=times_asked(1, Kind.TOKEN),
    ),
    Case(
        name="401 whatever we bring",
        make=lambda _: [wrong.unauthorized()],
        auth=Auth.TOKEN,
        error=CredentialsError,
        word="tokens",
        seconds=1,
        look=times_asked(4, Kind.TOKEN),
    ),
    *(
        Case(
            name=f"401 with a challenge, {name}",
            make=lambda _, value=value: [another_scope(value)],
            error=error,
            word=word,
            seconds=1,
            look=times_asked(2, Kind.MANIFEST),
        )
        for name, value, error, word in (
            ("unknown", "Negotiate", CredentialsError, "does not know"),
            ("empty", "", CredentialsError, "does not know"),
            ("without a realm", "Bearer", RegistryError, "realm"),
            ("with a realm that is none", 'Bearer realm="file:///etc/passwd"', RegistryError, "realm"),
            ("elsewhere in plain text", 'Bearer realm="http://192.0.2.1/t"', RegistryError, "without TLS"),
            ("long", "a" * 60_000, CredentialsError, "does not know"),
        )
    ),
    Case(
        name="a token endpoint that refuses",
        make=lambda _: [wrong.status(403, on=TOKEN)],
        auth=Auth.TOKEN,
        error=CredentialsError,
        word="403",
        look=times_asked(1, Kind.TOKEN),
    ),
    Case(
        name="a token endpoint that fails once",
        make=lambda _: [wrong.status(503, on=TOKEN, times=1)],
        auth=Auth.TOKEN,
    ),
    Case(
        name="a token endpoint that fails",
        make=lambda _: [wrong.status(503, on=TOKEN)],
        auth=Auth.TOKEN,
        error=RegistryError,
        word="503",
        look=times_asked(3, Kind.TOKEN),
    ),
    Case(
        name="a token endpoint that redirects",
        make=lambda _: [wrong.answers(TOKEN, code=302, headers={"Location": "http://192.0.2.1/"})],
        auth=Auth.TOKEN,
        error=RegistryError,
        word="302",
    ),
    *(
        Case(
            name=f"a token that is {name}",
            make=lambda _, content=content: [wrong.answers(TOKEN, content)],
            auth=Auth.TOKEN,
            error=RegistryError,
            word=word,
            seconds=1,
        )
        for name, content, word in (
            ("rubbish", b"rubbish", "no token"),
            ("missing", b"{}", "no token"),
            ("a number", b'{"token": 1}', "no token"),
            ("a header", b'{"token": "a\\r\\nX-Evil: 1"}', "no token"),
            ("huge", bytes(2 << 20), "more than"),
            ("good for ever so long", b'{"token": "a", "expires_in": 1e400}', "no token"),
        )
    ),
    Case(
        name="a token endpoint that stalls",
        make=lambda _: [wrong.stalls(TOKEN, after_bytes=3)],
        auth=Auth.TOKEN,
        error=RegistryError,
        word="stalls",
    ),
    Case(
        name="a token endpoint that is down",
        auth=Auth.TOKEN,
        options={"realm": "http://127.0.0.1:1/token"},
        error=RegistryError,
        word="refused",
        seconds=1,
    ),
]


def any_size(answer: Answer) -> Answer:
    if "Content-Range" in answer.headers:
        answer.headers["Content-Range"] = answer.headers["Content-Range"].partition("/")[0] + "/*"
    return answer


def assert_pause(registry: Registry, seconds: float) -> None:
    first, second = registry.asked("GET", Kind.MANIFEST)[:2]
    assert second.started - first.started >= seconds


def assert_ranges(registry: Registry, digest: str, ranges: list[str | None]) -> None:
    assert [r.headers.get("range") for r in registry.downloads(digest)] == ranges


@parametrize(PULLS)
def test_a_pull(case: Case, sample: Sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "_STRAGGLER_SECONDS", case.straggler_seconds)
    target = Layout.create(tmp_path / "target")
    with Registry(auth=case.auth, misbehave=case.make(sample), **case.options) as registry:
        sample.serve(registry)
        reference = f"{registry.host}/{case.reference.replace('ROOT', sample.root.digest)}"
        access = access_to(credentials=case.credentials, patience=case.patience)
        with within(case.seconds), expecting(case.error, case.word) as raised:
            pull(reference, target, access)
        case.look(registry, sample)
        assert registry.leaks == []
        if case.error is None:
            assert_all_there(target, sample.root, sample)
            return
        assert case.word in said(raised.value), said(raised.value)
        assert PASSWORD not in said(raised.value)
        assert_nothing_to_see(target)
        there = blobs_below(target)
        again(registry, sample, reference, target, there)


def again(registry: Registry, sample: Sample, reference: str, target: Layout, there: set[str]) -> None:
    """When the registry behaves again, another try brings what is missing, and nothing else."""
    registry.behave()
    registry.realm = f"http://{registry.host}/token"
    sample.serve(registry)
    before = len(registry.requests)
    access = access_to()
    pull(reference, target, access)
    assert_all_there(target, sample.root, sample)
    asked = {
        r.reference for r in registry.requests[before:] if r.kind is Kind.BLOB and r.status in {200, 206}
    }
    assert asked == {b.digest for b in sample.blobs.values() if b.size} - there
    missing = [b for b in sample.blobs.values() if b.digest not in there]
    assert access.tally.fetched_bytes == sum(b.size for b in missing)
    assert access.tally.reused_blobs == len(sample.blobs) - len(missing)


# Mirrors.


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
    Mirror(name="no ranges", make=lambda _: [wrong.ignores_range()]),
    Mirror(name="no ranges midway", make=lambda _: [wrong.ignores_range(skip=4)]),
    Mirror(name="a redirect to a file", make=lambda _: [wrong.redirects(blob(), to="file:///etc/passwd")]),
    Mirror(name="a redirect to nobody", make=lambda _: [wrong.redirects(blob(), to="http://127.0.0.1:1/")]),
]


def assert_only(registry: Registry, digest: str) -> None:
    assert {r.reference for r in registry.downloads()} == {digest}


def assert_shared(mirror: Registry, registry: Registry, sample: Sample) -> None:
    assert 0 < sent(registry, sample) < sample.big.size


@parametrize(MIRRORS)  # type: ignore[arg-type]
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
        access = replace(access, config=replace(access.config, registries={registry.host: settings}))
        pull(f"{registry.host}/a/b:1", Layout.create(tmp_path), access)
        assert not registry.downloads()
        assert first.downloads()
        assert len(second.downloads(sample.small.digest)) == 1


@pytest.mark.parametrize("url", ["127.0.0.1:5000", "ftp://a", "http://", "http://a?b", "http://u:p@a"])
def test_what_is_no_mirror(url: str) -> None:
    with pytest.raises(UsageError, match="is no mirror"):
        Repository(named("127.0.0.1:5000/a/b"), access_to(url))


# Pushes.


def upload_elsewhere(request: Request) -> bool:
    return request.elsewhere and request.kind is Kind.UPLOAD


def sent_uploads(registry: Registry, sample: Sample) -> int:
    return len(registry.uploads(sample.big.digest))


PUSHES = [
    Case(name="nothing is wrong"),
    Case(name="a token", auth=Auth.TOKEN, look=times_asked(2, Kind.TOKEN)),
    Case(name="a password", auth=Auth.BASIC),
    *(
        Case(name=f"Location {form}", make=lambda _, form=form: [wrong.upload_location(form)], auth=auth)
        for form, auth in (("relative", Auth.TOKEN), ("absolute", Auth.TOKEN), ("query", Auth.BASIC))
    ),
    Case(
        name="Location elsewhere",
        make=lambda _: [wrong.upload_location("elsewhere")],
        auth=Auth.TOKEN,
        look=lambda r, s: assert_elsewhere(r),
    ),
    Case(
        name="Location of a file",
        make=lambda _: [
            wrong.answers(upload(None, "POST"), code=202, headers={"Location": "file:///etc/passwd"})
        ],
        error=RegistryError,
        word="leads nowhere",
        seconds=1,
    ),
    Case(
        name="Location missing",
        make=lambda _: [wrong.header(upload(None, "POST"), "Location", None)],
        error=RegistryError,
        word="Location",
        seconds=1,
    ),
    Case(name="PUT 500 once", make=lambda s: [wrong.status(500, on=upload(s.big.digest), times=1)]),
    Case(
        name="PUT 500 once, early",
        make=lambda s: [wrong.status(500, on=upload(s.big.digest), early=True, times=1)],
    ),
    Case(
        name="PUT 500 for ever",
        make=lambda s: [wrong.status(500, on=upload(s.big.digest))],
        error=RegistryError,
        word="500",
        look=lambda r, s: assert_uploads(r, s, 3),
    ),
    Case(
        name="PUT 413, early",
        make=lambda s: [wrong.status(413, on=upload(s.big.digest), early=True)],
        error=RegistryError,
        word="413",
        look=lambda r, s: assert_uploads(r, s, 1),
        seconds=1,
    ),
    Case(
        name="PUT 429",
        make=lambda s: [wrong.status(429, on=upload(s.big.digest), retry_after=1, times=1)],
        look=lambda r, s: assert_upload_pause(r, s, 1.0),
    ),
    Case(
        name="PUT 429 for ages",
        make=lambda s: [wrong.status(429, on=upload(s.big.digest), retry_after=999)],
        error=RegistryError,
        word="left alone",
        seconds=1,
    ),
    Case(name="PUT 404 once", make=lambda s: [wrong.status(404, on=upload(s.big.digest), times=1)]),
    Case(
        name="PUT 403",
        make=lambda s: [wrong.status(403, on=upload(s.big.digest))],
        error=CredentialsError,
        word="does not allow",
        look=lambda r, s: assert_uploads(r, s, 1),
        seconds=1,
    ),
    Case(name="PUT done, and 500", make=lambda _: [wrong.fails_after(upload(), times=2)]),
    Case(
        name="PUT resets once",
        make=lambda s: [wrong.resets(upload(s.big.digest), after_bytes=9000, times=1)],
    ),
    Case(
        name="PUT resets for ever",
        make=lambda s: [wrong.resets(upload(s.big.digest), after_bytes=9000)],
        error=RegistryError,
        word="cannot be reached",
        look=lambda r, s: assert_uploads(r, s, 3),
    ),
    Case(
        name="PUT stalls once",
        make=lambda s: [wrong.stalls(upload(s.big.digest), after_bytes=9000, times=1)],
    ),
    Case(
        name="PUT stalls for ever",
        make=lambda s: [wrong.stalls(upload(s.big.digest), after_bytes=9000)],
        error=RegistryError,
        word="in time",
        seconds=4,
    ),
    Case(
        name="PUT of another digest",
        make=lambda s: [wrong.header(upload(s.big.digest), "Docker-Content-Digest", f"sha256:{1:064}")],
        error=IntegrityError,
        word="stored",
    ),
    Case(
        name="PUT says 400",
        make=lambda s: [wrong.answers(upload(s.big.digest), DIGEST_INVALID, code=400)],
        error=IntegrityError,
        word="got other bytes",
    ),
    Case(name="POST 503", make=lambda _: [wrong.status(503, on=upload(None, "POST"), times=2)]),
    Case(
        name="POST 403",
        make=lambda _: [wrong.status(403, on=upload(None, "POST"))],
        error=CredentialsError,
        word="does not allow",
        seconds=1,
    ),
    Case(name="HEAD 405", make=lambda _: [wrong.status(405, on=On(method="HEAD"))]),
    Case(name="HEAD 404", make=lambda _: [wrong.status(404, on=On(method="HEAD"))]),
    Case(
        name="HEAD of another size",
        make=lambda s: [wrong.too_few_bytes(s.big.digest, method="HEAD")],
        look=lambda r, s: assert_uploads(r, s, 1),
    ),
    Case(
        name="tokens that expire midway",
        make=lambda _: [wrong.tokens_expire(after=3)],
        auth=Auth.TOKEN,
    ),
    Case(
        name="a wrong password",
        auth=Auth.BASIC,
        credentials=WRONG,
        error=CredentialsError,
        word="refuses the password",
        look=lambda r, s: assert_requests(r, 2),
        seconds=0.5,
    ),
    Case(
        name="a wrong password for a token",
        auth=Auth.TOKEN,
        credentials=WRONG,
        error=CredentialsError,
        word="docker login",
        look=lambda r, s: assert_requests(r, 2),
        seconds=0.5,
    ),
    Case(
        name="may read alone",
        auth=Auth.TOKEN,
        credentials=None,
        options={"anonymous_pull": True},
        error=CredentialsError,
        word="docker login",
        seconds=1,
        look=times_asked(2, Kind.TOKEN),
    ),
    Case(name="manifest 500 once", make=lambda _: [wrong.status(500, on=manifest("1", "PUT"), times=1)]),
    Case(
        name="manifest refused",
        make=lambda _: [wrong.status(400, on=manifest("1", "PUT"))],
        error=RegistryError,
        word="400",
    ),
    Case(
        name="manifest of another digest",
        make=lambda _: [
            wrong.header(manifest("1", "PUT"), "Docker-Content-Digest", f"sha256:{1:064}", times=1)
        ],
        error=IntegrityError,
        word="stored",
    ),
    Case(name="hangs up after each answer", make=lambda _: [wrong.hangs_up(ANYTHING)]),
    Case(name="restarts midway", make=lambda s: [wrong.restarts(upload(s.big.digest), 0.2, times=1)]),
]

DIGEST_INVALID = b'{"errors": [{"code": "DIGEST_INVALID", "message": "the test said so"}]}'


def assert_elsewhere(registry: Registry) -> None:
    there = [r for r in registry.requests if upload_elsewhere(r)]
    assert there
    assert not any("authorization" in r.headers for r in there)


def assert_uploads(registry: Registry, sample: Sample, count: int) -> None:
    assert len(registry.uploads(sample.big.digest)) == count


def assert_requests(registry: Registry, count: int) -> None:
    assert len(registry.requests) == count, [str(r) for r in registry.requests]


def assert_upload_pause(registry: Registry, sample: Sample, seconds: float) -> None:
    first, second = registry.uploads(sample.big.digest)
    assert second.started - first.started >= seconds


@parametrize(PUSHES)
def test_a_push(case: Case, sample: Sample) -> None:
    with Registry(auth=case.auth, misbehave=case.make(sample), **case.options) as registry:
        reference = f"{registry.host}/a/b:1"
        with within(case.seconds), expecting(case.error, case.word) as raised:
            push(sample, reference, access_to(credentials=case.credentials))
        case.look(registry, sample)
        assert registry.leaks == []
        if case.error is None:
            assert_pushed(registry, sample)
            return
        assert case.word in said(raised.value), said(raised.value)
        there = registry.repositories.get("a/b", _Repository())
        assert case.name == "manifest of another digest" or not there.tags
        # When the registry behaves again, another try brings what is missing, and nothing else.
        registry.behave()
        had, before = set(there.blobs), len(registry.requests)
        access = access_to()
        push(sample, reference, access)
        assert_pushed(registry, sample)
        put = {r.reference for r in registry.requests[before:] if r.kind is Kind.UPLOAD and r.method == "PUT"}
        assert put == {b.digest for b in sample.blobs.values()} - had
        assert access.tally.sent_bytes == sum(b.size for b in sample.blobs.values() if b.digest not in had)


def assert_pushed(registry: Registry, sample: Sample) -> None:
    there = registry.repositories["a/b"]
    assert there.tags == {"1": sample.root.digest}
    assert {d: bytes(content) for d, content in there.blobs.items()} == {
        b.digest: sample.content(b) for b in sample.blobs.values()
    }
    puts = [r.reference for r in registry.requests if r.method == "PUT" and r.status == 201]
    assert puts[-1] == "1"
    assert set(puts[: puts.index(sample.manifest.digest)]) == set(there.blobs)


def test_what_is_there_is_mounted_or_left(sample: Sample) -> None:
    with Registry(auth=Auth.TOKEN) as registry:
        sample.serve(registry, "from/here")
        access = access_to()
        push(sample, f"{registry.host}/a/b:1", access, mount_from=["not/here", "from/here"])
        assert_pushed_quietly(registry, sample)
        assert access.tally.reused_bytes == access.tally.expected_bytes
        before = len(registry.requests)
        push(sample, f"{registry.host}/a/b:2", access_to())
        assert {r.method for r in registry.requests[before:]} <= {"HEAD", "GET", "PUT"}
        assert not [r for r in registry.requests[before:] if r.kind is Kind.UPLOAD]


@pytest.mark.parametrize(
    "misbehaviour",
    [
        lambda: wrong.ignores_mounts(),
        lambda: wrong.status(405, on=MOUNT),
        lambda: wrong.status(403, on=MOUNT),
        lambda: wrong.status(500, on=MOUNT),
        lambda: wrong.answers(MOUNT, code=202, headers={"Location": "ftp://x/"}),
    ],
)
def test_without_mounts_blobs_are_sent(misbehaviour: Callable[[], Misbehave], sample: Sample) -> None:
    with Registry(misbehave=[misbehaviour()]) as registry:
        sample.serve(registry, "from/here")
        push(sample, f"{registry.host}/a/b:1", access_to(), mount_from=["from/here"])
        assert_pushed(registry, sample)
        assert not registry.repositories["a/b"].sessions


def assert_pushed_quietly(registry: Registry, sample: Sample) -> None:
    assert registry.repositories["a/b"].tags == {"1": sample.root.digest}
    assert not [r for r in registry.uploads() if r.method == "PUT"]


def test_a_damaged_blob_is_not_pushed(tmp_path: Path) -> None:
    sample = make_sample(tmp_path)
    path = tmp_path / "blobs" / "sha256" / sample.big.digest.hex
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with Registry() as registry:
        with pytest.raises(IntegrityError, match="not those of its digest"):
            push(sample, f"{registry.host}/a/b:1", access_to())
        there = registry.repositories["a/b"]
        assert sample.big.digest not in there.blobs
        assert not there.tags
        assert len(registry.uploads(sample.big.digest)) == 1


def test_from_one_registry_to_another(sample: Sample) -> None:
    with Registry() as source, Registry() as mirror, Registry(auth=Auth.TOKEN) as target:
        sample.serve(source)
        sample.serve(mirror, tag=None)
        mirror.misbehave(wrong.wrong_bytes(sample.big.digest))
        access = access_to(f"http://{mirror.host}")
        with Repository(named(f"{source.host}/a/b:1"), access) as repository:
            tree = transfer.explore(repository, repository.resolve(), access.config.limits)
            transfer.into_registry(repository, tree, named(f"{target.host}/a/b:1"), access)
        assert_pushed(target, sample)
        assert access.tally.reused_blobs == 0
        assert access.tally.blobs == len(sample.blobs)
        assert {r.method for r in mirror.requests} == {"GET"}  # nothing is ever pushed there


def test_a_source_that_fails_is_not_asked_by_way_of_the_target(sample: Sample) -> None:
    failure = wrong.status(500, on=blob(sample.big.digest))
    with Registry(misbehave=[failure]) as source, Registry() as target:
        sample.serve(source)
        access = access_to()
        with Repository(named(f"{source.host}/a/b:1"), access) as repository:
            tree = transfer.explore(repository, repository.resolve(), access.config.limits)
            with within(3), pytest.raises(RegistryError, match="fails"):
                transfer.into_registry(repository, tree, named(f"{target.host}/a/b:1"), access)
        assert len(source.downloads(sample.big.digest)) == PATIENCE.attempts
        assert not target.repositories["a/b"].tags


# Referrers.


@pytest.fixture
def referred(sample: Sample) -> Iterator[tuple[Registry, str]]:
    """A registry with an image and what refers to it."""
    with Registry() as registry:
        sample.serve(registry)
        subject = {"mediaType": sample.root.media_type, "digest": sample.root.digest, "size": 1}
        signature = registry.add_image("a/b", None, b"signature", subject=subject, artifactType="text/x")
        about = registry.repositories["a/b"].manifests[signature]
        entry = {"mediaType": about[0], "digest": signature, "size": len(about[1])}
        index = {"schemaVersion": 2, "mediaType": media_types.INDEX, "manifests": [entry]}
        registry.add_manifest("a/b", index, sample.root.digest.replace(":", "-"))
        registry.requests.clear()
        yield registry, signature


def referrers(registry: Registry, sample: Sample) -> list[str]:
    with Repository(named(f"{registry.host}/a/b"), access_to()) as repository:
        return [str(each.digest) for each in repository.referrers(sample.root.digest)]


@pytest.mark.parametrize(
    "make",
    [
        list,
        lambda: [wrong.no_referrers()],
        lambda: wrong.web_page(),
        lambda: [wrong.status(code, on=REFERRERS) for code in (400,)],
        lambda: [wrong.status(401, on=REFERRERS)],
        lambda: [wrong.status(403, on=REFERRERS)],
        lambda: [wrong.status(500, on=REFERRERS)],
        lambda: [wrong.stalls(REFERRERS, after_bytes=10)],
        lambda: [wrong.answers(REFERRERS, b"<html>", headers={"Content-Type": "text/html"})],
    ],
)
def test_referrers_are_found(
    make: Callable[[], list[Misbehave]], referred: tuple[Registry, str], sample: Sample
) -> None:
    registry, signature = referred
    registry.misbehave(*make())
    with within(4):
        assert referrers(registry, sample) == [signature]
    assert not registry.asked(elsewhere=True)


def test_referrers_come_page_by_page(sample: Sample) -> None:
    with Registry(page_size=2) as registry:
        sample.serve(registry)
        subject = {"mediaType": sample.root.media_type, "digest": sample.root.digest, "size": 1}
        all_of_them = {
            registry.add_image("a/b", None, bytes([number]), subject=subject) for number in range(7)
        }
        assert set(referrers(registry, sample)) == all_of_them
        link = f'<http://{registry.host}/v2/a/b/referrers/{sample.root.digest}>; rel="next"'
        registry.misbehave(wrong.header(REFERRERS, "Link", link))  # without end
        with within(3), pytest.raises(FormatError, match="more than 1000"):
            referrers(registry, sample)


def test_no_referrers_and_no_tag_are_none(sample: Sample) -> None:
    with Registry(misbehave=[wrong.no_referrers()]) as registry:
        sample.serve(registry)
        assert referrers(registry, sample) == []


def test_that_there_are_no_referrers_is_not_said_of_a_registry_that_fails(sample: Sample) -> None:
    with Registry(misbehave=[wrong.status(503, on=REFERRERS)]) as registry:
        sample.serve(registry)
        with pytest.raises(RegistryError, match="fails"):
            referrers(registry, sample)


def test_a_tag_that_is_an_alias_of_the_subject_is_no_list(sample: Sample) -> None:
    with Registry(misbehave=[wrong.no_referrers()]) as registry:
        sample.serve(registry, tag=sample.root.digest.replace(":", "-"))
        assert referrers(registry, sample) == []


def test_referrers_that_lie_are_given_as_they_are(referred: tuple[Registry, str], sample: Sample) -> None:
    registry, _ = referred
    other = registry.add_image("a/b", None, b"of something else")
    registry.misbehave(wrong.lying_referrers(registry, "a/b", other))
    assert referrers(registry, sample) == [other]  # whoever wants to know opens each


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"manifests": 1}', b'{"manifests": [{}]}'])
def test_lists_of_referrers_that_are_none(content: bytes, sample: Sample) -> None:
    with Registry() as registry:
        registry.misbehave(wrong.answers(REFERRERS, content, headers={"Content-Type": media_types.INDEX}))
        sample.serve(registry)
        with pytest.raises(FormatError):
            referrers(registry, sample)


@pytest.mark.parametrize("knows", [True, False])
def test_who_refers_is_listed_by_us_where_the_registry_does_not(knows: bool, sample: Sample) -> None:
    with Registry(misbehave=[] if knows else [wrong.no_referrers()]) as registry:
        sample.serve(registry)
        registry.add_blob("a/b", b"{}")
        with Repository(named(f"{registry.host}/a/b"), access_to()) as repository:
            found = set()
            for number in range(3):
                document = {
                    "schemaVersion": 2,
                    "mediaType": media_types.MANIFEST,
                    "artifactType": f"text/{number}",
                    "config": {"mediaType": "x/y", "digest": Digest.of_bytes(b"{}"), "size": 2},
                    "layers": [],
                    "subject": sample.root.to_json(),
                }
                content = json.dumps(document).encode()
                found.add(repository.put_manifest(content, media_types.MANIFEST))
                repository.put_manifest(content, media_types.MANIFEST)  # again, and it is there once
        with Repository(named(f"{registry.host}/a/b"), access_to()) as repository:
            listed = repository.referrers(sample.root.digest)
        assert {each.digest for each in listed} == found
        assert sorted(each.artifact_type for each in listed) == ["text/0", "text/1", "text/2"]
        assert len(registry.repositories["a/b"].tags) == (1 if knows else 2)


@pytest.mark.parametrize("media_type", ["", "text/plain", "a/b\r\nX-Evil: 1", "ä/ö"])
def test_what_is_no_manifest_is_not_stored(media_type: str) -> None:
    with Repository(named("127.0.0.1:1/a/b"), access_to()) as repository, pytest.raises(FormatError):
        repository.put_manifest(b"{}", media_type)


# Who is there, and who is not.


def test_a_refused_connection_is_said_at_once(tmp_path: Path) -> None:
    with within(1), pytest.raises(RegistryError, match="cannot be reached"):
        pull(f"127.0.0.1:{free_port()}/a/b:1", Layout.create(tmp_path), access_to(patience=Patience()))


def test_who_does_not_take_connections_is_waited_for_as_long_as_patience_says(tmp_path: Path) -> None:
    with deaf_port() as port, within(1.5), pytest.raises(RegistryError, match="in time"):
        pull(f"127.0.0.1:{port}/a/b:1", Layout.create(tmp_path), access_to())


@contextlib.contextmanager
def deaf_port() -> Iterator[int]:
    """A port that answers nobody: its queue is full."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.socket())
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        address = server.getsockname()
        for _ in range(4):
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(address)
        time.sleep(0.05)
        yield address[1]


def test_loopback_needs_no_proxy(sample: Sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    with Registry() as registry:
        sample.serve(registry)
        target = Layout.create(tmp_path)
        pull(f"{registry.host}/a/b:1", target, access_to())
        assert_all_there(target, sample.root, sample)


@pytest.mark.parametrize(
    "proxy", ["socks5://127.0.0.1:1", "http://", "http://127.0.0.1:99999", "http://a..b:1", "http://[::1"]
)
def test_a_proxy_that_cannot_be_used(proxy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", proxy)
    with Repository(named("registry.invalid/a/b"), access_to()) as repository:  # noqa: SIM117
        with pytest.raises(RegistryError, match="proxy"):
            repository.resolve()


@pytest.mark.parametrize("host", ["a..b", f"{'a' * 64}.example", f"{'a.' * 200}example", "[12::34::56]"])
def test_a_host_that_cannot_be_one(host: str) -> None:
    with pytest.raises(UsageError, match="is no registry"):
        Repository(named(f"{host}:5000/a/b"), access_to())


@pytest.mark.parametrize(
    ("host", "scheme"),
    [
        ("127.0.0.1:5000", "http"),
        ("localhost:5000", "http"),
        ("[::1]:5000", "http"),
        ("[2001:db8::1]:5000", "https"),
        ("127.0.0.1.example.com", "https"),
        ("127.example.com", "https"),
        ("localhost.example.com", "https"),
        ("registry.example.com", "https"),
    ],
)
def test_only_loopback_is_spoken_to_in_plain_text(host: str, scheme: str) -> None:
    with Repository(named(f"{host}/a/b"), access_to()) as repository:
        assert repository._base.scheme == scheme


# Ending.


@pytest.mark.parametrize(
    "make",
    [
        lambda: wrong.stalls(blob(), after_bytes=-1),
        lambda: wrong.stalls(blob(), after_bytes=100),
        lambda: wrong.slow(blob(), 1),
        lambda: wrong.status(429, on=blob(), retry_after=30),
        lambda: wrong.closes(blob()),
        lambda: wrong.ignores_range(blob(), skip=10**6),
    ],
)
@pytest.mark.parametrize("extra", ["", "close", "chunked", "no ranges"])
def test_a_transfer_can_be_ended_from_outside(
    make: Callable[[], Misbehave], extra: str, sample: Sample, tmp_path: Path
) -> None:
    patience = Patience(jobs=4, attempts=10)
    more = {
        "close": [wrong.header(ANYTHING, "Connection", "close")],
        "chunked": [wrong.chunked(blob())],
        "no ranges": [wrong.ignores_range()],
    }
    with Registry(misbehave=[*more.get(extra, []), make()]) as registry:
        sample.serve(registry)
        access = access_to(patience=patience, rate=200_000)
        with Repository(named(f"{registry.host}/a/b:1"), access) as repository:
            tree = transfer.explore(repository, repository.resolve(), access.config.limits)
            stream = repository.open_blob(sample.big)
            timer = threading.Timer(0.5, repository.cancel)
            timer.start()
            with within(1.7), pytest.raises(RekindleError):
                transfer.into_layout(repository, tree, Layout.create(tmp_path), "pulled", access)
            with within(0.5), pytest.raises(RekindleError):
                stream.read()
            stream.close()
            with pytest.raises(RegistryError, match="ended"):
                repository.open_blob(sample.big)
            timer.join()


def test_a_push_can_be_ended_from_outside(sample: Sample) -> None:
    with Registry(misbehave=[wrong.stalls(upload(), after_bytes=100)]) as registry:
        access = access_to(patience=Patience(jobs=4))
        tree = transfer.explore(sample.layout, sample.root, access.config.limits)
        with Repository(named(f"{registry.host}/a/b:1"), access) as repository:
            timer = threading.Timer(0.3, repository.cancel)
            timer.start()
            with within(1.3), pytest.raises(RekindleError):
                transfer.copy(sample.layout, tree, repository, tag="1", jobs=4, tally=access.tally)
            timer.join()


def test_a_connection_that_is_being_made_can_be_ended() -> None:
    with deaf_port() as port, Repository(named(f"127.0.0.1:{port}/a/b"), access_to(patience=Patience())) as r:
        timer = threading.Timer(0.2, r.cancel)
        timer.start()
        with within(1.2), pytest.raises(RegistryError):
            r.resolve()
        timer.join()


def test_streams_need_not_be_read_to_their_end(sample: Sample) -> None:
    with Registry() as registry:
        sample.serve(registry)
        with Repository(named(f"{registry.host}/a/b"), access_to()) as repository:
            for _ in range(20):
                with repository.open_blob(sample.big) as stream:
                    stream.read(1)
            with repository.open_blob(sample.big) as stream:
                assert stream.read() == sample.content(sample.big)


@pytest.mark.parametrize("make", [list, lambda: [wrong.ignores_range()]])
def test_many_streams_at_once_are_each_right(
    make: Callable[[], list[Misbehave]], sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Buffers go from hand to hand, with losers of races among those who wrote to them."""
    monkeypatch.setattr(download, "_STRAGGLER_SECONDS", 0.0)
    monkeypatch.setattr(download, "_LOOK_SECONDS", 0.001)
    hiccups = wrong.Misbehaviour(on=blob(), act=hiccup)
    with Registry(misbehave=[*make(), hiccups]) as registry:
        sample.serve(registry)
        patience = Patience(jobs=8, attempts=50)
        with Repository(named(f"{registry.host}/a/b"), access_to(patience=patience)) as repository:
            wanted, got = sample.content(sample.big), []

            def read() -> None:
                with repository.open_blob(sample.big) as stream:
                    got.append(stream.read() == wanted)

            threads = [threading.Thread(target=read) for _ in range(12)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(30)
            assert got == [True] * 12


def hiccup(request: Request, proceed: Callable[[Request], Answer]) -> Answer:
    answer = proceed(request)
    dice = random.random()
    if dice < 0.1:
        return replace(answer, cut_after=int(dice * 10 * len(answer.body)), ending=Ending.CLOSE)
    if dice < 0.3:
        return replace(answer, bytes_per_second=STRETCH * 4)
    return answer


def test_a_rate_is_kept_to(sample: Sample, tmp_path: Path) -> None:
    with Registry() as registry:
        sample.serve(registry)
        began = time.monotonic()
        rate = sample.big.size
        pull(f"{registry.host}/a/b:1", Layout.create(tmp_path), access_to(rate=rate))
        assert 0.6 < time.monotonic() - began < 2
        began = time.monotonic()
        push(sample, f"{registry.host}/c/d:1", access_to(rate=rate))
        assert 0.6 < time.monotonic() - began < 2
