# SPDX-License-Identifier: Apache-2.0
"""List the files of a dump for the record, and recreate them on disk from it."""

import os
import stat
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from rekindle.record import FileKind, StoredFile, StoredMemory

if TYPE_CHECKING:
    from rekindle.criu.memory_files import MemoryFile

TOPS = ("criu", "memory", "shm")
"""CRIU's images; the memory of processes; the cell's /dev/shm."""


def tops(files: Sequence[StoredFile]) -> list[str]:
    """Return the top directories of a dump: one whose memory CRIU restores has no `memory`."""
    used = {file.path.parts[0] for file in files}
    return [top for top in TOPS if top != "memory" or top in used]


def make(files: Sequence[StoredFile], tree: Path) -> None:
    """Create every file of the dump in its size, as a hole.

    Relies on the checks of the record: no path leads outside `tree`, and none leads through a link.
    """
    for top in tops(files):
        (tree / top).mkdir(mode=0o700)
    for file in files:
        path = tree / file.path
        match file.kind:
            case FileKind.DIRECTORY:
                path.mkdir(mode=0o700)
            case FileKind.SYMLINK:
                path.symlink_to(file.target)
            case FileKind.FIFO:
                os.mkfifo(path, 0o600)
            case FileKind.HARDLINK:
                os.link(tree / file.target, path)
            case FileKind.FILE:
                with open(path, "xb") as new:
                    new.truncate(file.size)


def finish(files: Sequence[StoredFile], tree: Path) -> None:
    """Set the owner, mode and times of every file; of directories last, since writing changes theirs."""
    for file in reversed(files):
        path = tree / file.path
        if file.kind is FileKind.HARDLINK:
            continue
        os.chown(path, file.uid, file.gid, follow_symlinks=False)
        if file.kind is not FileKind.SYMLINK:
            path.chmod(file.mode)
        os.utime(path, ns=(file.mtime_ns, file.mtime_ns), follow_symlinks=False)


def scan(tree: Path) -> list[StoredFile]:
    """Return the files below `criu/`, `memory/` and `shm/`, in an order in which `make` can create them."""
    found: list[StoredFile] = []
    names: dict[tuple[int, int], str] = {}
    for top in TOPS:
        for directory, directories, filenames in os.walk(tree / top):
            directories.sort()
            for name in [*directories, *sorted(filenames)]:
                path = Path(directory, name)
                if file := _describe(path, path.relative_to(tree).as_posix(), names):
                    found.append(file)
    return sorted(found, key=lambda file: (file.kind is FileKind.HARDLINK, file.path.parts))


def _describe(path: Path, name: str, names: dict[tuple[int, int], str]) -> StoredFile | None:
    status = path.lstat()
    target = ""
    size = 0
    if stat.S_ISDIR(status.st_mode):
        kind = FileKind.DIRECTORY
    elif stat.S_ISLNK(status.st_mode):
        kind, target = FileKind.SYMLINK, str(path.readlink())
    elif stat.S_ISFIFO(status.st_mode):
        kind = FileKind.FIFO
    elif stat.S_ISREG(status.st_mode):
        identity = (status.st_dev, status.st_ino)
        kind, target = FileKind.FILE, ""
        size = status.st_size
        if status.st_nlink > 1 and identity in names:
            kind, target, size = FileKind.HARDLINK, names[identity], 0
        names.setdefault(identity, name)
    else:  # CRIU binds sockets again, and devices do not belong into a dump
        return None
    return StoredFile(
        path=PurePosixPath(name),
        kind=kind,
        size=size,
        mode=stat.S_IMODE(status.st_mode),
        uid=status.st_uid,
        gid=status.st_gid,
        mtime_ns=status.st_mtime_ns,
        target=target,
    )


def stored_memory(file: "MemoryFile") -> StoredMemory:
    """Describe a memory file for the record."""
    return StoredMemory(
        path=PurePosixPath("memory", file.name),
        data_bytes=file.data_bytes,
        ranges=[(each.start, each.end) for each in file.ranges],
    )
