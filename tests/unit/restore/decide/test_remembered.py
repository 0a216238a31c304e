# SPDX-License-Identifier: Apache-2.0
"""A finding is used again only while it is proved that no file has changed."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from rekindle.proc import boot_id
from restore.decide import remembered
from restore.decide.remembered import Findings


class Compared:
    """A comparison that counts how often it is made."""

    def __init__(self, place: Path, files: list[Path]) -> None:
        self.findings = Findings(place)
        self.files = files
        self.times = 0

    def __call__(self, expected: str = "") -> object:
        def compare() -> list[str]:
            self.times += 1
            return [path.read_text() for path in self.files if path.exists()]

        return self.findings.find([expected], [str(path) for path in self.files], compare)


@pytest.fixture(autouse=True)
def _settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The files of a test need not be old."""
    monkeypatch.setattr(remembered, "_SETTLED_NS", -1_000_000_000)


@pytest.fixture
def compared(tmp_path: Path) -> Compared:
    (tmp_path / "compared").mkdir()
    files = [tmp_path / "a", tmp_path / "b", tmp_path / "missing"]
    files[0].write_text("1")
    files[1].write_text("2")
    return Compared(tmp_path / "compared", files)


def test_what_was_found_is_found_again(compared: Compared) -> None:
    assert compared() == compared() == ["1", "2"]
    assert compared.times == 1


def in_place(path: Path) -> None:
    status = path.stat()
    path.write_text("9")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def replaced(path: Path) -> None:
    status = path.stat()
    path.with_name("new").write_text("9")
    os.utime(path.with_name("new"), ns=(status.st_atime_ns, status.st_mtime_ns))
    path.with_name("new").replace(path)


def is_a_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("b")


CHANGES: dict[str, Callable[[Path], object]] = {
    "is written in place, with its time": in_place,
    "is replaced by one with its time": replaced,
    "is removed": Path.unlink,
    "is another kind of file": is_a_link,
}


@pytest.mark.parametrize("name", CHANGES)
def test_it_is_compared_again_after_a_file(name: str, compared: Compared) -> None:
    before = compared()
    CHANGES[name](compared.files[0])
    assert compared() != before
    assert compared.times == 2


def test_it_is_compared_again_after_a_file_appears(compared: Compared) -> None:
    compared()
    compared.files[2].write_text("3")
    assert compared() == ["1", "2", "3"]


def test_another_record_is_another_comparison(compared: Compared) -> None:
    compared("one")
    compared("two")
    assert compared.times == 2


def test_a_file_that_changed_just_now_is_not_remembered(
    compared: Compared, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second change within a tick of the clock would look the same."""
    monkeypatch.setattr(remembered, "_SETTLED_NS", 2_000_000_000)
    compared()
    compared()
    assert compared.times == 2


@pytest.mark.parametrize(("number", "times"), [(0, 2), (7, 1)])
def test_a_whole_second_proves_nothing_but_on_disks_with_a_number(
    number: int, times: int, compared: Compared, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In images of squashfs, for example, all times of a file are that of its source."""
    monkeypatch.setattr(remembered, "_SECOND_NS", 1)
    monkeypatch.setattr(remembered, "_number", lambda *_: number)
    assert compared() == compared()
    assert compared.times == times


def test_another_disk_is_another(compared: Compared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remembered, "_SECOND_NS", 1)
    for number in (7, 8):
        monkeypatch.setattr(remembered, "_number", lambda *_, number=number: number)
        compared()
    assert compared.times == 2


@pytest.mark.parametrize("path", ["/proc/version", "/dev/null", "/sys/kernel"])
def test_what_is_no_disk_has_no_number(path: str) -> None:
    assert remembered._number(os.stat(path).st_dev, path) == 0


def test_a_boot_ends_it(compared: Compared) -> None:
    compared()
    (kept,) = compared.findings._directory.iterdir()  # type: ignore[union-attr]
    kept.write_text(kept.read_text().replace(boot_id(), "another"))
    compared()
    assert compared.times == 2


@pytest.mark.parametrize("content", ["", "{", "[]", "7", '{"boot": 1}', "[" * 100_000])
def test_a_broken_memory_is_no_memory(content: str, compared: Compared) -> None:
    compared()
    (kept,) = compared.findings._directory.iterdir()  # type: ignore[union-attr]
    kept.write_text(content)
    assert compared() == ["1", "2"]
    assert compared.times == 2
    assert json.loads(kept.read_text())["found"] == ["1", "2"]


def test_it_is_bounded(compared: Compared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remembered, "_KEPT", 3)
    for number in range(9):
        compared(str(number))
    assert len(list(compared.findings._directory.iterdir())) == 3  # type: ignore[union-attr]


def test_without_a_place_nothing_is_remembered(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    compared = Compared(tmp_path, [tmp_path / "a"])
    compared.findings = remembered.NOTHING_KNOWN
    compared()
    compared()
    assert compared.times == 2


def test_a_place_that_cannot_be_written_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    compared = Compared(tmp_path / "a" / "no-directory", [tmp_path / "a"])
    assert compared() == ["1"]
