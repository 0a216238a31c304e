# SPDX-License-Identifier: Apache-2.0
"""Copies of files outside a cell, so that each replica has its own.

    /dev/shm/.rekindle-private/     in the cell, and part of its snapshots
        PATH                        the copy of PATH, with all directories above it

A dump has the copies, and a restore covers the paths with them. What is not there is made first, as the
server itself would make it: a directory with its owner and mode, or an empty file. Files that the server only
reads are covered by nothing: they are made where they are missing.
"""

import contextlib
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from rekindle.cell import Cell
from rekindle.errors import RestoreError
from rekindle.files import copy_attributes, copy_path

DIRECTORY = Path("/dev/shm/.rekindle-private")  # noqa: S108 - in the cell's private file system


def keep(cell: Cell, paths: Sequence[str], directories: Sequence[str], shm: Path) -> tuple[str, ...]:
    """Copy paths of a cell, and the given directories without content, into a copy of its /dev/shm.

    The processes that write to them must have ended. Returns the paths without those that are gone.
    """
    top = shm / DIRECTORY.name
    kept = []
    for path in directories:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            _make_parents(cell, f"{path}/content", top)
    for path in paths:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            origin = cell.root / path.lstrip("/")
            origin.lstat()
            _make_parents(cell, path, top)
            copy_path(origin, top / path.lstrip("/"))
            kept.append(path)
    return tuple(kept)


def _make_parents(cell: Cell, path: str, top: Path) -> None:
    """Make the copies of the directories above a path."""
    top.mkdir(mode=0o755, exist_ok=True)
    here, there = top, cell.root
    for name in Path(path.lstrip("/")).parts[:-1]:
        here, there = here / name, there / name
        status = there.stat()
        if not here.exists():
            here.mkdir(mode=0o700)
            copy_attributes(here, status)


def give(
    cell: Cell, paths: Sequence[str], directories: Sequence[str], made: Sequence[str] = ()
) -> contextlib.ExitStack:
    """Cover paths with the copies in a cell's /dev/shm; make missing directories, and files that are `made`.

    Return what removes again what was made. Raises RestoreError, after which nothing of it is left.
    """
    with contextlib.ExitStack() as undo:
        try:
            for path in (*directories, *paths):
                for place in _missing(path):
                    _make(cell, place, undo)
            for path in made:
                for place in _missing(path):
                    _make(cell, place, undo, whole=str(place) == path)
            problems = cell.bind([(str(DIRECTORY / path.lstrip("/")), path) for path in paths])
        except OSError as error:
            problems = [f"{error.filename}: {error.strerror}"]
        if problems:
            raise RestoreError(
                "the replica cannot get files of its own",
                cause="; ".join(problems),
                hint="make these places writable, as they were for the snapshot",
            )
        return undo.pop_all()


def _missing(path: str) -> Iterator[Path]:
    """Yield what is missing of a path, from the top down."""
    yield from (each for each in (*reversed(Path(path).parents), Path(path)) if not os.path.lexists(each))


def _make(cell: Cell, place: Path, undo: contextlib.ExitStack, *, whole: bool = False) -> None:
    """Make a directory like the one that was copied, or an empty file, or if `whole` the file.

    Another replica may make it at the same time. Raises OSError.
    """
    copy = cell.root / str(DIRECTORY).lstrip("/") / str(place).lstrip("/")
    status = copy.lstat()
    with contextlib.suppress(FileExistsError):
        if stat.S_ISDIR(status.st_mode):
            place.mkdir(mode=0o700)
        elif whole:
            _put(copy, place)
            undo.callback(place.unlink, missing_ok=True)
            return
        else:
            place.touch(mode=0o600, exist_ok=False)
        undo.callback(_remove, place)
        copy_attributes(place, status)


def _put(copy: Path, place: Path) -> None:
    """Make a copy of a file. Others see it complete or not at all. Raises FileExistsError."""
    staged = place.with_name(f".{place.name[:200]}.{os.urandom(6).hex()}")
    try:
        copy_path(copy, staged)
        os.link(staged, place)
    finally:
        staged.unlink(missing_ok=True)


def _remove(place: Path) -> None:
    with contextlib.suppress(OSError):  # another replica has written to it, or has removed it
        if place.is_dir():
            place.rmdir()
        elif not place.stat().st_size:
            place.unlink()
