# SPDX-License-Identifier: Apache-2.0
"""Choose the destination of a kernel cache, and make the private directory that it is first written to."""

import contextlib
import os
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

from msgspec import Struct, field

from oci.cache.inventory import StoredRoot
from oci.cache.places import recorded_place
from rekindle.config import Limits
from rekindle.engine.caches import CacheKind, path_below
from rekindle.errors import FormatError, UsageError
from rekindle.files import remove_tree, try_lock

FILES_LIMIT = 1_000_000
"""The most files and directories that one cache may have."""

_STAGED = ".rekindle-"
_ALONE_SECONDS = 60.0
_FULL_HINT = "free some, or extract to another disk"


class ExtractedRoot(Struct, frozen=True, kw_only=True):
    """A cache that was extracted to `path`.

    `kept` are the entries that were there with other content and were not replaced; `written` are the files,
    relative to `path`, that were not there before.
    """

    kind: CacheKind
    path: Path
    files: int
    bytes: int
    kept: Sequence[str]
    written: Sequence[PurePosixPath] = ()


class Owner(Struct, frozen=True, kw_only=True):
    """The user who is given what is extracted; -1 leaves the user or group as it is."""

    uid: int
    gid: int = -1

    def take(self, path: Path | int) -> None:
        """Make a file or directory theirs, given its path or descriptor. Links are not followed."""
        if isinstance(path, int):
            os.chown(path, self.uid, self.gid)
        else:
            os.chown(path, self.uid, self.gid, follow_symlinks=False)


class Job(Struct, kw_only=True):
    """A cache that is being extracted. It has as many files and bytes as `root` says, if it is `exact`."""

    root: StoredRoot
    target: Path
    staging: Path
    owner: Owner | None = None
    exact: bool = True
    bytes_limit: int = 0
    bytes: int = 0
    directories: list[tuple[PurePosixPath, int, int]] = field(default_factory=list)
    groups: list[PurePosixPath] = field(default_factory=list)
    paths: list[PurePosixPath] = field(default_factory=list)


def target_of(root: StoredRoot, to: Path | Mapping[str, Path] | None, own: Mapping[str, str]) -> Path:
    """Return the destination of a cache. Raises UsageError if it is the recorded one, and may not be."""
    if isinstance(to, Mapping) and str(to[root.name]) != root.recorded:
        return to[root.name]
    if isinstance(to, Path):
        return path_below(root.kind, Path(posixpath.normpath(to.absolute())) / root.name)
    return recorded_place(root, own)


def refuse_too_large(root: StoredRoot, stored_bytes: int, limits: Limits) -> None:
    """Raise FormatError if a cache has more files or bytes than the limits allow."""
    if root.files > FILES_LIMIT or root.bytes > limits.expanded_bytes(stored_bytes):
        raise FormatError(
            f"the {root.kind} cache is larger than the limits allow",
            cause=f"{root.files:,} files with {root.bytes:,} bytes, compressed to {stored_bytes:,} bytes",
            hint="if that is right, raise `expansion_ratio` in [limits] of the configuration",
        )


@contextlib.contextmanager
def staging(target: Path, owner: Owner | None = None) -> Iterator[Path]:
    """Make a private directory beside a destination, locked while it is in use, and remove it at the end.

    It is inside the destination if that is a mount of its own, as in containers, or if its parent is not
    writable: files can be renamed only within one mount. Directories that are made above it are `owner`'s.
    """
    real = Path(os.path.realpath(target))
    within = is_mount(real) or (real.is_dir() and not os.access(real.parent, os.W_OK))
    parent = real if within else real.parent
    with contextlib.ExitStack() as stack:
        for directory in reversed([parent, *parent.parents]):
            try:
                directory.mkdir()
            except FileExistsError:
                continue
            except OSError as error:
                if directory.is_dir():  # a read-only file system, further up
                    continue
                raise cannot_be_written(target, error) from None
            stack.callback(_remove_if_empty, directory)
            if owner is not None:
                owner.take(directory)
        staging = parent / f".{target.name}{_STAGED}{os.urandom(6).hex()}"
        # Held until ours is locked, so that no other extraction removes it as left behind.
        with alone_in(parent) as alone:
            if alone:
                sweep(parent, target.name)
            try:
                staging.mkdir(mode=0o700)
            except OSError as error:
                raise cannot_be_written(target, error) from None
            stack.callback(remove_tree, staging)
            fd = os.open(staging, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, fd)
            try_lock(fd)
        yield staging


def is_mount(path: Path) -> bool:
    """Tell whether a mount begins at a path, also one by `mount --bind` of the same file system."""
    own, above = _mount_of(path), _mount_of(path.parent)
    return own != above if own and above else os.path.ismount(path)


def _mount_of(path: Path) -> str:
    """Return the OS kernel's name for the mount of a path; "" if it is not told."""
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            told = Path(f"/proc/self/fdinfo/{fd}").read_text()
        finally:
            os.close(fd)
        return next((line for line in told.splitlines() if line.startswith("mnt_id:")), "")
    return ""


@contextlib.contextmanager
def alone_in(parent: Path) -> Iterator[bool]:
    """Keep other extractions from making or removing staging directories there; yield whether that worked."""
    fd = -1
    alone = False
    with contextlib.suppress(OSError):  # it is a file, or its file system has no locks
        fd = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        alone = try_lock(fd, timeout=_ALONE_SECONDS)
    try:
        yield alone
    finally:
        if fd >= 0:
            os.close(fd)


def cannot_be_written(target: Path, error: OSError) -> UsageError | OSError:
    """Return the error to raise for a destination: `error` itself if the disk is full, else a UsageError."""
    import errno

    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return error
    return UsageError(f"{target} cannot be written", cause=str(error), hint="--to DIR chooses another place")


def _remove_if_empty(directory: Path) -> None:
    with contextlib.suppress(OSError):
        directory.rmdir()


def sweep(parent: Path, name: str) -> None:
    """Remove what killed extractions left beside a destination."""
    prefix = f".{name}{_STAGED}"
    left: list[Path] = []
    with contextlib.suppress(OSError), os.scandir(parent) as entries:
        left = [Path(entry.path) for entry in entries if entry.name.startswith(prefix)]
    for path in left:
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                if try_lock(fd):
                    remove_tree(path)
            finally:
                os.close(fd)
