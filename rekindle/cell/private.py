# SPDX-License-Identifier: Apache-2.0
"""Copies of files outside a cell, so that each replica has its own.

    /dev/shm/.rekindle-private/     in the cell, and part of its snapshots
        PATH                        the copy of PATH, with all directories above it

A dump has the copies, and a restore covers the paths with them. What is not there is made first, as the
server itself would make it: a directory with its owner and mode, or an empty file.
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


def give(cell: Cell, paths: Sequence[str], directories: Sequence[str]) -> contextlib.ExitStack:
    """Cover paths with the copies in a cell's /dev/shm; make the directories that are missing.

    Return what removes again what was made. Raises RestoreError, after which nothing of it is left.
    """
    with contextlib.ExitStack() as undo:
        try:
            for path in (*directories, *paths):
                for place in _missing(path):
                    _make(cell, place, undo)
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


def _make(cell: Cell, place: Path, undo: contextlib.ExitStack) -> None:
    """Make a place for a copy: a directory like it, or an empty file. Raises OSError."""
    copy = cell.root / str(DIRECTORY).lstrip("/") / str(place).lstrip("/")
    status = copy.lstat()
    if stat.S_ISDIR(status.st_mode):
        place.mkdir(mode=0o700)
        undo.callback(_remove, place)
    else:
        place.touch(mode=0o600, exist_ok=False)
        undo.callback(_remove, place)
    copy_attributes(place, status)


def _remove(place: Path) -> None:
    with contextlib.suppress(OSError):  # another replica has written to it, or has removed it
        if place.is_dir():
            place.rmdir()
        elif not place.stat().st_size:
            place.unlink()
