# SPDX-License-Identifier: Apache-2.0
"""Copies of files outside a cell are kept, and are put into their places."""

import os
from pathlib import Path
from typing import Any, cast

import pytest

from rekindle.cell import Cell, private
from rekindle.errors import RestoreError


class FakeCell:
    """A cell that shows the machine's own files, and notes what covers what."""

    def __init__(self, root: Path = Path("/"), problems: list[str] | None = None) -> None:
        self.root, self.problems = root, problems or []
        self.bound: list[tuple[str, str]] = []

    def bind(self, pairs: list[tuple[str, str]]) -> list[str]:
        self.bound += pairs
        return self.problems


def cell(**options: Any) -> Cell:
    return cast("Cell", FakeCell(**options))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place with a lock, a pipe and a directory, whose copies are in the directory `.copies` of `shm`."""
    place = tmp_path / "room" / "place"
    place.mkdir(parents=True)
    (place.parent / "lock").write_bytes(b"1234")
    os.mkfifo(place.parent / "pipe")
    (place / "link").symlink_to("/nowhere")
    (place / "file").write_text("kept")
    place.chmod(0o750)
    monkeypatch.setattr(private, "DIRECTORY", tmp_path / "shm" / ".copies")
    (tmp_path / "shm").mkdir()
    return place


def keep(place: Path, *paths: Path, directories: tuple[Path, ...] = ()) -> tuple[str, ...]:
    shm = private.DIRECTORY.parent
    return private.keep(cell(), [str(path) for path in paths], [str(path) for path in directories], shm)


def test_copies_lie_below_their_directories(place: Path) -> None:
    room = place.parent
    kept = keep(place, place, room / "lock", room / "pipe", room / "gone" / "away")
    assert kept == (str(place), str(room / "lock"), str(room / "pipe"))
    copy = private.DIRECTORY / str(room).lstrip("/")
    assert (copy / "lock").read_bytes() == b"1234"
    assert (copy / "pipe").is_fifo()
    assert (copy / "place" / "file").read_text() == "kept"
    assert (copy / "place").stat().st_mode & 0o777 == 0o750
    assert (copy / "place" / "link").is_symlink()


def test_what_is_there_is_covered(place: Path) -> None:
    keep(place, place)
    here = FakeCell()
    private.give(cast("Cell", here), [str(place)], []).close()
    assert here.bound == [(f"{private.DIRECTORY}{place}", str(place))]
    assert (place / "file").read_text() == "kept"


def test_what_is_missing_is_made_and_removed_if_it_was_in_vain(place: Path) -> None:
    room = place.parent
    keep(place, place / "file", room / "lock", directories=(place,))
    for path in (place / "file", place / "link", room / "lock", room / "pipe"):
        path.unlink()
    place.rmdir()
    room.rmdir()
    with private.give(cell(), [str(place / "file"), str(room / "lock")], [str(place)]):
        assert (room / "lock").read_bytes() == b""
        assert place.stat().st_mode & 0o777 == 0o750
        assert (place / "file").read_bytes() == b""
    assert not room.exists()
    with pytest.raises(RestoreError, match="files of its own"):
        private.give(cell(problems=["x: no"]), [str(room / "lock")], [])
    assert not room.exists()


def test_a_file_that_is_only_read_is_made_where_it_is_missing(place: Path) -> None:
    lock = place.parent / "lock"
    keep(place, lock)
    lock.write_bytes(b"here")
    here = FakeCell()
    with private.give(cast("Cell", here), [], [], [str(lock)]):
        assert lock.read_bytes() == b"here"
    lock.unlink()
    with private.give(cast("Cell", here), [], [], [str(lock)]):
        assert lock.read_bytes() == b"1234"
        assert sorted(path.name for path in place.parent.iterdir()) == ["lock", "pipe", "place"]
    assert not lock.exists()
    assert not here.bound


def test_what_somebody_has_written_meanwhile_stays(place: Path) -> None:
    room = place.parent
    keep(place, room / "lock")
    (room / "lock").unlink()
    with private.give(cell(), [str(room / "lock")], []):
        (room / "lock").write_text("theirs")
    assert (room / "lock").read_text() == "theirs"
