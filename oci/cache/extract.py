# SPDX-License-Identifier: Apache-2.0
"""Extract a kernel cache. Nothing of it is visible before all of it was checked.

Each cache is written into a private directory beside its destination, `.NAME.rekindle-XXXX`. When the bytes
of every layer have matched their digests, those directories are renamed to the destinations, or merged with
what is there. They are removed if the command fails, and by the next command if it was killed.
"""

import contextlib
import os
import threading
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path, PurePosixPath

from msgspec import Struct

from oci.cache.image import CacheImage
from oci.cache.inventory import METADATA_LIMIT_BYTES
from oci.cache.names import Names
from oci.cache.publish import finish, open_below, publish
from oci.cache.staging import (
    _FULL_HINT,
    FILES_LIMIT,
    ExtractedRoot,
    Job,
    Owner,
    _remove_if_empty,
    refuse_too_large,
    staging,
    target_of,
)
from oci.cache.tar_reader import LayerReader, Member
from oci.trust.verifier import Verified
from rekindle.config import Limits
from rekindle.engine.caches import CacheKind, environment_for, is_within
from rekindle.errors import FormatError, IntegrityError, NotFoundError, UsageError
from rekindle.os_errors import naming_full_disk

_MANIFEST_LIMIT_BYTES = 256 << 20  # MCV's, which is read but not kept


class Extraction(Struct, frozen=True, kw_only=True):
    """The caches that were written, and the variables that make a server use them."""

    roots: Sequence[ExtractedRoot]
    environment: Mapping[str, str]

    @property
    def written_bytes(self) -> int:
        """The bytes of all files that were written."""
        return sum(root.bytes for root in self.roots)

    def undo(self) -> None:
        """Remove the files that were written, and the directories that are empty then. Other files stay."""
        for root in self.roots:
            real = Path(os.path.realpath(root.path))
            directories: set[PurePosixPath] = set()
            for path in root.written:
                with contextlib.suppress(OSError):
                    (real / path).unlink()
                directories |= set(path.parents)
            for directory in sorted(directories, key=lambda path: len(path.parts), reverse=True):
                _remove_if_empty(real / directory)


def extract(
    verified: Verified[CacheImage],
    to: Path | Mapping[str, Path] | None,
    *,
    limits: Limits,
    kinds: Collection[CacheKind] | None = None,
    overwrite: bool = False,
    own: Mapping[str, str] | None = None,
    owner: Owner | None = None,
    workers: int = 0,
) -> Extraction:
    """Write the caches of an image to `to/KIND/…`, or if `to` is None, to where each was recorded.

    If `to` is a mapping, only the roots that it names are written, each to its place. A cache that is there
    already gets the entries it lacks; an entry with other content is kept, unless `overwrite`. Modes and
    times are as packed, but without write permission for others; directories without files are not made.
    Idempotent.

    A recorded place is used only if it looks like one of such a cache, or if `own`, the environment of
    today, names it (`oci.cache.places`). What is written is given to `owner`, for which one must be root.

    Raises IntegrityError if bytes do not match their digest, FormatError for a malformed layer, NotFoundError
    if the image has no cache of the kinds, UsageError for a destination that cannot be used, SpaceError.
    """
    image = verified.value
    roots = [
        root
        for root in image.inventory.roots
        if (kinds is None or root.kind in kinds) and (not isinstance(to, Mapping) or root.name in to)
    ]
    if not roots:
        raise NotFoundError(f"{image.manifest.digest} has no kernel cache of that kind")
    targets = [target_of(root, to, own or {}) for root in roots]
    if owner is not None and os.geteuid() != 0:
        raise UsageError("only root can give what is extracted to another user")
    real = [os.path.realpath(target) for target in targets]
    nested = any(one != other and is_within(one, other) for one in real for other in real)
    if nested or len(set(real)) != len(real):
        raise UsageError(
            "the destinations of two kernel caches overlap",
            cause=", ".join(sorted(map(str, targets))),
            hint="extract them to a directory: --to DIR",
        )
    for root in roots:
        refuse_too_large(root, image.layers[root.layer].size, limits)
    while True:
        with contextlib.ExitStack() as stack, naming_full_disk(targets[0], hint=_FULL_HINT):
            jobs = [
                Job(
                    root=root,
                    target=target,
                    staging=stack.enter_context(staging(target, owner)),
                    owner=owner,
                    exact=image.counted,
                    bytes_limit=limits.expanded_bytes(image.layers[root.layer].size),
                )
                for root, target in zip(roots, targets, strict=True)
            ]
            try:
                _read_all(image, jobs, limits, workers or len(os.sched_getaffinity(0)))
            except IntegrityError:
                if not image.blobs.fall_back_to_origin():
                    raise
                continue
            for job in jobs:
                finish(job)
            extracted: list[ExtractedRoot] = []
            try:
                for job in jobs:
                    extracted.append(publish(job, overwrite=overwrite))
            except BaseException:
                Extraction(roots=extracted, environment={}).undo()
                raise
            break
    environment: dict[str, str] = {}
    for each in extracted:
        environment = environment_for(each.kind, str(each.path)) | environment
        inner = {name: each.path / directory for name, directory in image.inner.items()}
        environment |= {name: str(path) for name, path in inner.items() if path.is_dir()}
    return Extraction(roots=extracted, environment=dict(sorted(environment.items())))


def _read_all(image: CacheImage, jobs: Sequence[Job], limits: Limits, workers: int) -> None:
    from concurrent.futures import ThreadPoolExecutor

    stop = threading.Event()
    with ThreadPoolExecutor(min(workers, len(jobs))) as pool:
        running = [pool.submit(_read_layer, image, job, limits, stop) for job in jobs]
        try:
            for each in running:
                each.result()
        except BaseException:
            stop.set()
            image.blobs.cancel()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _read_layer(image: CacheImage, job: Job, limits: Limits, stop: threading.Event) -> None:
    """Write the files of a layer into the staging directory, and check all of its bytes."""
    from concurrent.futures import ThreadPoolExecutor

    layer = image.layers[job.root.layer]
    limit_bytes = limits.expanded_bytes(layer.size)
    with (
        ThreadPoolExecutor(1) as ahead,
        contextlib.closing(LayerReader(image.blobs, layer, limit_bytes=limit_bytes, pool=ahead)) as reader,
    ):
        try:
            _write_members(reader, job, stop)
            if not stop.is_set():
                reader.finish(image.diff_ids[job.root.layer])
        except FormatError as error:
            raise reader.verdict(error) from error


def _write_members(reader: LayerReader, job: Job, stop: threading.Event) -> None:
    prefix = PurePosixPath(job.root.prefix)
    aside = PurePosixPath(prefix.parts[0].removesuffix(".cache") + ".manifest")
    names, known, seen_aside = Names(), {PurePosixPath()}, set[PurePosixPath]()
    empty: dict[PurePosixPath, tuple[int, int]] = {}  # made when a file needs them
    files = size = 0
    with _Tree(job.staging) as tree:
        for member in reader.members():
            if stop.is_set():
                return
            path = PurePosixPath(member.name)
            if str(path) != member.name or path.is_absolute() or not path.parts or ".." in path.parts:
                raise FormatError("the layer has an invalid file name", cause=f"{member.name!r:.120}")
            if not path.is_relative_to(prefix) or path == prefix:
                _skip(reader, member, path, prefix, aside, seen_aside)
                continue
            path = path.relative_to(prefix)
            if reason := names.problem(path):
                raise FormatError(f"the layer has a file that {reason}", cause=f"{member.name!r:.120}")
            if path.parent not in known:
                raise FormatError("the layer has a file before its directory", cause=f"{member.name!r:.120}")
            if member.is_directory:
                known.add(path)
                empty[path] = (member.mode, member.mtime_ns)
            else:
                files, size = files + 1, size + member.size
                if job.exact and (files > job.root.files or size > job.root.bytes):
                    raise FormatError("the layer has more files or bytes than its inventory says")
                if files > FILES_LIMIT or size > job.bytes_limit:
                    raise FormatError("the layer has more files or bytes than the limits allow")
                for directory in reversed(path.parents):
                    if directory in empty:
                        tree.make_directory(directory)
                        job.directories.append((directory, *empty.pop(directory)))
                tree.write_file(path, member, reader)
                job.paths.append(path)
                if path.name.startswith("__grp__") and member.size <= METADATA_LIMIT_BYTES:
                    job.groups.append(path)
            if len(known) > FILES_LIMIT:
                raise FormatError(f"the layer has more than {FILES_LIMIT:,} directories")
    job.bytes = size
    if job.exact and (files, size) != (job.root.files, job.root.bytes):
        raise FormatError("the layer has fewer files or bytes than its inventory says")


def _skip(
    reader: LayerReader,
    member: Member,
    path: PurePosixPath,
    prefix: PurePosixPath,
    aside: PurePosixPath,
    seen: set[PurePosixPath],
) -> None:
    """Skip the directories above the cache, and MCV's manifest. Raises FormatError for anything else."""
    expected = {*prefix.parents[:-1], prefix, aside} if member.is_directory else {aside / "manifest.json"}
    if path not in expected or path in seen or member.size > _MANIFEST_LIMIT_BYTES:
        raise FormatError("the layer has a file outside its cache", cause=f"{member.name!r:.120}")
    seen.add(path)
    if not member.is_directory:
        for _ in reader.content(member.size):
            pass


class _Tree:
    """A directory to write into by way of descriptors, so that no link is ever followed."""

    def __init__(self, root: Path) -> None:
        self._root = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        self._here, self._at = self._root, PurePosixPath()

    def __enter__(self) -> "_Tree":
        return self

    def __exit__(self, *_: object) -> None:
        self._leave()
        os.close(self._root)

    def make_directory(self, path: PurePosixPath) -> None:
        os.mkdir(path.name, 0o700, dir_fd=self._enter(path.parent))

    def write_file(self, path: PurePosixPath, member: Member, reader: LayerReader) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(path.name, flags, 0o600, dir_fd=self._enter(path.parent))
        try:
            for piece in reader.content(member.size):
                view = piece
                while view:
                    view = view[os.write(fd, view) :]
            os.fchmod(fd, member.mode)
            os.utime(fd, ns=(member.mtime_ns, member.mtime_ns))
        finally:
            os.close(fd)

    def _enter(self, path: PurePosixPath) -> int:
        """Return a descriptor of a directory. One is kept, since files come directory by directory."""
        if path != self._at:
            self._leave()
            self._here = open_below(self._root, path)
            self._at = path
        return self._here

    def _leave(self) -> None:
        if self._here != self._root:
            os.close(self._here)
        self._here, self._at = self._root, PurePosixPath()
