# SPDX-License-Identifier: Apache-2.0
"""Choose the destination of a kernel cache, and make the private directory that it is first written to."""

import contextlib
import os
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

from msgspec import Struct, field

from oci.cache.inventory import StoredRoot
from rekindle.config import Limits
from rekindle.engine.caches import CacheKind, is_within, path_below
from rekindle.errors import FormatError, UsageError
from rekindle.files import remove_tree, try_lock

FILES_LIMIT = 1_000_000
"""How many files and directories one cache may have."""

_STAGED = ".rekindle-"
_ALONE_SECONDS = 60.0
_FULL_HINT = "free some, or extract to another disk"


# No kernel cache is there, and other programs may run or read files that appear there.
_SYSTEM = ("/bin", "/boot", "/dev", "/etc", "/lib", "/lib32", "/lib64", "/proc", "/sbin", "/sys", "/usr")
_SYSTEM_ALLOWED = ("/dev/shm", "/usr/local/share", "/usr/share")  # noqa: S108
_PRIVATE = {".ssh", ".gnupg", ".config", ".aws", ".kube", ".docker", ".local"}


# A cache may be in the data directory of a user, but not where programs are started from automatically.
_DATA = (".local", "share")
_STARTED = {"applications", "systemd", "dbus-1", "autostart", "keyrings", "bash-completion", "fish", "zsh"}


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


class Job(Struct, kw_only=True):
    """A cache that is being extracted."""

    root: StoredRoot
    target: Path
    staging: Path
    directories: list[tuple[PurePosixPath, int, int]] = field(default_factory=list)
    groups: list[PurePosixPath] = field(default_factory=list)
    paths: list[PurePosixPath] = field(default_factory=list)


def target_of(root: StoredRoot, to: Path | Mapping[str, Path] | None) -> Path:
    """Return the destination of a cache. Raises UsageError if it was recorded in a system directory."""
    if isinstance(to, Mapping) and str(to[root.name]) != root.recorded:
        return to[root.name]
    if isinstance(to, Path):
        return path_below(root.kind, Path(posixpath.normpath(to.absolute())) / root.name)
    real = os.path.realpath(root.recorded)
    if (
        any(is_within(path, directory) for path in (root.recorded, real) for directory in _SYSTEM)
        and not any(is_within(real, directory) for directory in _SYSTEM_ALLOWED)
    ) or any(_is_private(PurePosixPath(path)) for path in (root.recorded, real)):
        raise UsageError(
            f"the {root.kind} cache was recorded at {root.recorded}, where rekindle does not write",
            hint="extract it to a directory: --to DIR",
        )
    return Path(root.recorded)


def _is_private(path: PurePosixPath) -> bool:
    parts = list(path.parts)
    if ".local" in parts:
        at = parts.index(".local")
        below = parts[at + 2 :]
        if tuple(parts[at : at + 2]) == _DATA and below and below[0] not in _STARTED:
            del parts[at : at + 2]
    return bool(_PRIVATE & set(parts))


def refuse_too_large(root: StoredRoot, stored_bytes: int, limits: Limits) -> None:
    """Raise FormatError if a cache has more files or bytes than the limits allow."""
    if root.files > FILES_LIMIT or root.bytes > limits.expanded_bytes(stored_bytes):
        raise FormatError(
            f"the {root.kind} cache is larger than the limits allow",
            cause=f"{root.files:,} files with {root.bytes:,} bytes, compressed to {stored_bytes:,} bytes",
            hint="if that is right, raise `expansion_ratio` in [limits] of the configuration",
        )


@contextlib.contextmanager
def staging(target: Path) -> Iterator[Path]:
    """Make a private directory beside a destination, locked while it is in use, and remove it at the end.

    It is inside the destination if that is a mount of its own, as in containers, or if its parent is not
    writable: files can be renamed only within one file system.
    """
    real = Path(os.path.realpath(target))
    within = os.path.ismount(real) or (real.is_dir() and not os.access(real.parent, os.W_OK))
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
