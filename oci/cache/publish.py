# SPDX-License-Identifier: Apache-2.0
"""Move a staged kernel cache to its destination: rename it, or merge it with what is there."""

import contextlib
import errno
import json
import os
import stat
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath

from oci.cache.inventory import entry_key
from oci.cache.staging import ExtractedRoot, Job, cannot_be_written
from rekindle.engine.caches import CacheKind
from rekindle.errors import UsageError

_COMPARED_BYTES = 1 << 20
_WITH_GROUPS = {CacheKind.TRITON, CacheKind.INDUCTOR, CacheKind.VLLM}


def open_below(root: int, path: PurePosixPath) -> int:
    """Open a directory without following a link. Raises OSError."""
    fd = os.dup(root)
    for part in path.parts:
        try:
            inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
        finally:
            os.close(fd)
        fd = inner
    return fd


def finish(job: Job) -> None:
    """Correct the paths in the cache for its destination, and set modes and times of directories."""
    if job.root.kind in _WITH_GROUPS:
        together = set(job.paths)
        for path in job.groups:
            _rewrite_group(job, path, together)
    for path, mode, mtime_ns in reversed(job.directories):
        directory = job.staging / path
        directory.chmod(mode | 0o700)
        os.utime(directory, ns=(mtime_ns, mtime_ns))
    job.staging.chmod(0o755)
    if job.owner is not None:
        for path in (*job.paths, *(path for path, *_ in job.directories), PurePosixPath()):
            job.owner.take(job.staging / path)


def _rewrite_group(job: Job, path: PurePosixPath, together: Collection[PurePosixPath]) -> None:
    """Correct the absolute paths in a group file of Triton.

    Triton ignores the whole group if one of the files is missing.
    """
    file = job.staging / path
    try:
        document = json.loads(file.read_bytes())
    except (ValueError, RecursionError):  # Triton will compile again
        return
    children = document.get("child_paths") if isinstance(document, dict) else None
    if not isinstance(children, dict):
        return
    moved = {
        name: str(job.target / path.parent / name) if path.parent / name in together else old
        for name, old in children.items()
        if "/" not in name
    }
    if moved == children:
        return
    status = file.stat()
    with open(file, "r+b") as opened:
        opened.write(json.dumps({**document, "child_paths": moved}).encode())
        opened.truncate()
    os.utime(file, ns=(status.st_mtime_ns, status.st_mtime_ns))


def publish(job: Job, *, overwrite: bool) -> ExtractedRoot:
    """Make the cache visible: in one step if nothing is there, else entry by entry."""
    target = Path(os.path.realpath(job.target))
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        with contextlib.suppress(OSError):  # another process has put one there meanwhile
            os.rename(job.staging, target)  # noqa: PTH104 - onto an empty directory, too
            return ExtractedRoot(
                kind=job.root.kind,
                path=job.target,
                files=len(job.paths),
                bytes=job.bytes,
                kept=(),
                written=tuple(job.paths),
            )
    try:
        there = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except NotADirectoryError:
        raise UsageError(f"{job.target} is not a directory", hint="--to DIR chooses another place") from None
    written: list[PurePosixPath] = []
    try:
        return _merge(job, there, written, overwrite=overwrite)
    except BaseException as error:
        for path in written:
            with contextlib.suppress(OSError):
                (target / path).unlink()
        if isinstance(error, OSError):  # such as a read-only mount, which is told from a full cache only here
            raise cannot_be_written(job.target, error) from None
        raise
    finally:
        os.close(there)


def _merge(job: Job, there: int, written: list[PurePosixPath], *, overwrite: bool) -> ExtractedRoot:
    """Add what is missing to the cache at `there`, and to `written` each file that was not there before."""
    groups: dict[str, list[PurePosixPath]] = {}
    for path in job.paths:
        key = entry_key(job.root.kind, path)
        # A file without a key is an entry by itself, except in CUDA's cache, whose index covers all files.
        whole = key != "." or job.root.kind is CacheKind.CUDA
        groups.setdefault(key if whole else str(path), []).append(path)
    modes = {path: (mode, mtime_ns) for path, mode, mtime_ns in job.directories}
    kept: list[str] = []
    size = replaced = 0
    for key, paths in groups.items():
        states = {path: _compare(job.staging / path, there, path) for path in paths}
        if "blocked" in states.values() or ("different" in states.values() and not overwrite):
            kept.append(key)
            continue
        for path, state in states.items():
            if state != "same":
                size += (job.staging / path).stat().st_size
                _move(job, there, path, modes, replace=overwrite)
                if state == "absent":
                    written.append(path)
                else:
                    replaced += 1
    return ExtractedRoot(
        kind=job.root.kind,
        path=job.target,
        files=len(written) + replaced,
        bytes=size,
        kept=tuple(sorted(kept)),
        written=tuple(written),
    )


def _compare(staged: Path, there: int, path: PurePosixPath) -> str:
    """Compare a path with the staged file: `absent`, `same`, `different`, or `blocked` by something else."""
    try:
        parent = open_below(there, path.parent)
    except FileNotFoundError:
        return "absent"
    except OSError:  # a link or a file where a directory should be
        return "blocked"
    try:
        fd = os.open(path.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=parent)
    except FileNotFoundError:
        return "absent"
    except OSError:
        return "blocked"
    finally:
        os.close(parent)
    with open(fd, "rb", buffering=0) as old, open(staged, "rb", buffering=0) as new:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            return "blocked"
        if status.st_size != os.fstat(new.fileno()).st_size:
            return "different"
        while piece := new.read(_COMPARED_BYTES):
            if old.read(len(piece)) != piece:
                return "different"
    return "same"


def _move(
    job: Job,
    there: int,
    path: PurePosixPath,
    modes: Mapping[PurePosixPath, tuple[int, int]],
    *,
    replace: bool,
) -> None:
    """Move one file to its destination. Readers see it whole or not at all."""
    at = PurePosixPath()
    parent = os.dup(there)
    try:
        for part in path.parts[:-1]:
            at /= part
            made = False
            with contextlib.suppress(FileExistsError):
                os.mkdir(part, modes[at][0] | 0o700, dir_fd=parent)
                made = True
            inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
            os.close(parent)
            parent = inner
            if made and job.owner is not None:
                job.owner.take(parent)
        try:
            _place(job.staging / path, path.name, parent, replace=replace)
        except OSError as error:
            if error.errno != errno.EXDEV:  # a directory of the cache is a mount of its own
                raise
            _copy(job, path, parent, replace=replace)
    finally:
        os.close(parent)


def _place(staged: Path, name: str, parent: int, *, replace: bool, source: int | None = None) -> None:
    """Give a staged file its name in a directory."""
    if replace:
        os.rename(staged, name, src_dir_fd=source, dst_dir_fd=parent)
        return
    # A link, not a rename, which would replace an entry that another process has put there meanwhile.
    try:
        os.link(staged, name, src_dir_fd=source, dst_dir_fd=parent, follow_symlinks=False)
    except FileExistsError:
        return
    except OSError:  # a file system without hard links
        os.rename(staged, name, src_dir_fd=source, dst_dir_fd=parent)
        return
    os.unlink(staged, dir_fd=source)


def _copy(job: Job, path: PurePosixPath, parent: int, *, replace: bool) -> None:
    """Copy a file to another mount, by way of a hidden one beside it."""
    staged = Path(f".{path.name[:200]}.rekindle-{os.urandom(6).hex()}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with (
        open(job.staging / path, "rb") as file,
        open(os.open(staged, flags, 0o600, dir_fd=parent), "wb") as copy,
    ):
        try:
            while piece := file.read(_COMPARED_BYTES):
                copy.write(piece)
            copy.flush()
            status = os.fstat(file.fileno())
            os.fchmod(copy.fileno(), stat.S_IMODE(status.st_mode))
            if job.owner is not None:
                job.owner.take(copy.fileno())
            os.utime(copy.fileno(), ns=(status.st_mtime_ns, status.st_mtime_ns))
            _place(staged, path.name, parent, replace=replace, source=parent)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(staged, dir_fd=parent)
    with contextlib.suppress(FileNotFoundError):
        (job.staging / path).unlink()
