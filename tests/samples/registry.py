# SPDX-License-Identifier: Apache-2.0
"""An image to pull and push, how that is done, and what must hold when a registry misbehaves.

A case is one misbehaviour. Whatever it is, nothing that was not verified may be seen, nobody but the registry
may learn the password, no thread may stay, and another try must need no more than what is missing.
"""

import contextlib
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pytest
from msgspec import structs

from oci import media_types, transfer
from oci.descriptor import Descriptor
from oci.layout import Layout
from oci.progress import Limiter, Tally
from oci.reference import RegistryReference, parse
from oci.registry.access import Access
from oci.registry.certificates import Certificates
from oci.registry.credentials import Credentials
from oci.registry.repository import Repository
from rekindle.config import Config, Limits, RetryPolicy, TransferSettings
from rekindle.digest import Digest
from rekindle.errors import RekindleError
from tests.servers.registry.access import PASSWORD, USERNAME, Auth
from tests.servers.registry.simulator import Misbehave, Registry
from tests.servers.registry.wire import Kind

STRETCH = 64 << 10
SETTINGS = TransferSettings(
    jobs=4,
    connect_seconds=1,
    stall_seconds=0.5,
    retry=RetryPolicy(attempts=3, longest_wait_seconds=2),
)
CALM = structs.replace(SETTINGS, stall_seconds=5)
CLOSE_SETTINGS = structs.replace(SETTINGS, jobs=16, stall_seconds=1)  # for looks at close range
CONTEXTS = Certificates({}, ()).context
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


def access_to(
    *mirrors: str,
    settings: TransferSettings = SETTINGS,
    credentials: Credentials | None = RIGHT,
    rate: float | None = None,
    limits: Limits | None = None,
) -> Access:
    return Access(
        config=Config(transfer=settings, limits=limits or Limits()),
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
        assert layout.read(structs.replace(each), limit_bytes=1 << 30) == sample.content(each)
    assert not (layout.root / ".incoming").exists()


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds


def expecting(
    error: type[RekindleError] | None,
) -> AbstractContextManager[pytest.ExceptionInfo[RekindleError] | None]:
    return contextlib.nullcontext() if error is None else pytest.raises(error)


def said(error: RekindleError) -> str:
    return f"{error.message}\n{error.cause}\n{error.hint}"


def sent(registry: Registry, sample: Sample) -> int:
    """How many bytes of the large blob a registry has sent."""
    return sum(r.sent_bytes for r in registry.downloads(sample.big.digest) if r.status in {200, 206})


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
    settings: TransferSettings = SETTINGS
    options: dict[str, Any] = field(default_factory=dict)
    straggler_seconds: float = 10.0
    look: Callable[[Registry, Sample], None] = lambda *_: None
    reference: str = "a/b:1"


class Named(Protocol):
    @property
    def name(self) -> str: ...


def parametrize(cases: Sequence[Named]) -> pytest.MarkDecorator:
    assert len({case.name for case in cases}) == len(cases)
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name.replace(" ", "-"))


def times_asked(most: int, kind: Kind) -> Callable[[Registry, Sample], None]:
    def look(registry: Registry, _: Sample) -> None:
        assert len(registry.asked(None, kind)) <= most, [str(r) for r in registry.requests]

    return look
