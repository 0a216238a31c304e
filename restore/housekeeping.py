# SPDX-License-Identifier: Apache-2.0
"""List and remove what $REKINDLE_HOME keeps: images of the store, unpacked dumps, and kernel caches.

Nothing is removed that a server uses: its dump is locked while it runs (`restore.dumps`), and so is its
kernel cache (`caches/HEX.lock`). An image is in use if its dump or its kernel cache is, or if a server that
runs was started from it.
"""

import contextlib
import os
import time
from collections.abc import Collection, Iterator, Sequence
from enum import StrEnum
from pathlib import Path

from msgspec import Struct

from oci import media_types, store
from oci.descriptor import Descriptor, manifests_of
from oci.layout import Layout
from oci.reference import LayoutReference
from rekindle import replicas
from rekindle.errors import BusyError, FormatError, IntegrityError, NotFoundError
from rekindle.fields import Fields
from rekindle.files import remove_tree, try_lock
from rekindle.home import Home
from restore import dumps

_MANIFEST_LIMIT_BYTES = 64 << 20


class KeptKind(StrEnum):
    """The kinds of things that are kept."""

    IMAGE = "image"
    DUMP = "dump"
    CACHE = "cache"


class Kept(Struct, frozen=True, kw_only=True):
    """A thing that is kept. `bytes` of an image count what it shares with others, too; `used` is Unix time.

    The name of an image is its tag, that of others the digest of the manifest that they were made of.
    """

    kind: KeptKind
    name: str
    digest: str
    bytes: int
    used: float
    in_use: bool


def kept(home: Home) -> list[Kept]:
    """Return what is kept, images first, each kind sorted by the time of its last use, the latest first."""
    unpacked = [
        Kept(
            kind=KeptKind.DUMP,
            name=each.path.name,
            digest=f"sha256:{each.path.name}",
            bytes=each.bytes,
            used=each.used,
            in_use=each.in_use,
        )
        for each in dumps.listed(home)
    ]
    caches = list(_caches(home))
    parts = {each.digest: each for each in (*unpacked, *caches)}
    found = [*_images(home, parts), *unpacked, *caches]
    order = list(KeptKind)
    return sorted(found, key=lambda each: (order.index(each.kind), -each.used, each.name))


def remove(reference: LayoutReference, home: Home, *, force: bool = False) -> Descriptor:
    """Remove an image from the store or a layout, with the blobs and the dump that no other needs.

    Raises NotFoundError, and BusyError if a server uses it, unless `force`: the server runs on, but cannot be
    saved as a replica any more.
    """
    layout = store.layout_of(reference, home)
    descriptor = layout.resolve(reference.tag)
    parts = _parts(layout, descriptor)
    used = [each for each in kept(home) if each.in_use and each.digest in parts]
    used = [each for each in used if each.kind is not KeptKind.IMAGE or each.name == reference.tag]
    if used and not force:
        raise BusyError(
            f"a server uses {reference}",
            hint="stop it first (`rekindle ps`), or remove the image with --force",
        )
    with store.collecting(layout, reference):
        layout.untag(reference.tag)
    local, others = Layout(home.store), set[str]()
    with contextlib.suppress(NotFoundError):  # nothing was put into the store yet
        others = {part for each in local.tags().values() for part in _parts(local, each)}
    for digest in parts - others:
        if (dump := home.dumps / digest.removeprefix("sha256:")).exists():
            dumps.remove_unused(dump)
    return descriptor


def prune(
    home: Home,
    kinds: Collection[KeptKind],
    *,
    older_seconds: float = 0.0,
    keep_bytes: int | None = None,
    dry_run: bool = False,
) -> list[Kept]:
    """Remove what no server uses; return what was removed, or would be.

    Only what was not used for `older_seconds`. With `keep_bytes`, only as much, the least recently used
    first, that the rest of these kinds takes no more.
    """
    store.sweep(home)
    before = time.time() - older_seconds
    mine = [each for each in kept(home) if each.kind in kinds]
    total = sum(each.bytes for each in mine)
    removed: list[Kept] = []
    for each in sorted(mine, key=lambda each: each.used):
        if each.in_use or each.used > before or (keep_bytes is not None and total <= keep_bytes):
            continue
        if dry_run or _remove(each, home):
            removed.append(each)
            total -= each.bytes
    return removed


def _remove(each: Kept, home: Home) -> bool:
    match each.kind:
        case KeptKind.IMAGE:
            with contextlib.suppress(BusyError, NotFoundError):
                remove(LayoutReference(text=each.name, directory=None, tag=each.name), home)
                return True
            return False
        case KeptKind.DUMP:
            return dumps.remove_unused(home.dumps / each.name)
        case KeptKind.CACHE:
            with _lock_alone(home.root / "caches" / f"{each.name}.lock") as alone:
                if alone:
                    remove_tree(home.root / "caches" / each.name)
            return alone


def _images(home: Home, parts: dict[str, Kept]) -> Iterator[Kept]:
    layout = Layout(home.store)
    running = {each.status.image for each in replicas.found(home) if each.runs}
    with contextlib.suppress(NotFoundError):
        for tag, descriptor in layout.tags().items():
            size, used = descriptor.size, 0.0
            with contextlib.suppress(OSError):
                used = (home.store / "blobs/sha256" / descriptor.digest.hex).stat().st_mtime
            with contextlib.suppress(FormatError, IntegrityError):
                size = sum(_size(home.store, digest.hex) for digest in layout.reachable([descriptor]))
            uses = [parts[part] for part in _parts(layout, descriptor) if part in parts]
            yield Kept(
                kind=KeptKind.IMAGE,
                name=tag,
                digest=str(descriptor.digest),
                bytes=size,
                used=max([used, *(each.used for each in uses)]),
                in_use=any(each.in_use for each in uses)
                or bool(running & {tag, tag.removesuffix(":latest")}),
            )


def _size(root: Path, name: str) -> int:
    with contextlib.suppress(OSError):
        return (root / "blobs/sha256" / name).stat().st_size
    return 0


def _parts(layout: Layout, descriptor: Descriptor) -> set[str]:
    """Return the digests of an image and of the manifests that it lists."""
    found = {str(descriptor.digest)}
    if descriptor.media_type == media_types.INDEX:
        with contextlib.suppress(FormatError, IntegrityError):
            content = layout.read(descriptor, limit_bytes=_MANIFEST_LIMIT_BYTES)
            index = Fields.parse(content, "index", limit_bytes=_MANIFEST_LIMIT_BYTES)
            found |= {str(each.digest) for each in manifests_of(index)}
    return found


def _caches(home: Home) -> Iterator[Kept]:
    root = home.root / "caches"
    for path in sorted(root.iterdir()) if root.is_dir() else ():
        if path.is_dir() and not path.is_symlink():
            lock = path.with_name(f"{path.name}.lock")
            with _lock_alone(lock) as alone:
                used = max(each.stat().st_mtime for each in (path, lock))
            size = sum(each.lstat().st_size for each in path.rglob("*") if each.is_file())
            name = path.name
            yield Kept(
                kind=KeptKind.CACHE,
                name=name,
                digest=f"sha256:{name}",
                bytes=size,
                used=used,
                in_use=not alone,
            )


@contextlib.contextmanager
def _lock_alone(lock: Path) -> Iterator[bool]:
    fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        yield try_lock(fd)
    finally:
        os.close(fd)


def total_bytes(things: Sequence[Kept]) -> int:
    """Return the sum of their sizes. Images may share blobs, so less may be freed."""
    return sum(each.bytes for each in things)
