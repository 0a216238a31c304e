# SPDX-License-Identifier: Apache-2.0
"""What a start reads is described in order, without what is not there, made by the server, or not files."""

import mmap
import os
from pathlib import Path

import pytest

from rekindle.cell import page_tables
from rekindle.node.start_reads import decode
from snapshot import start_reads
from snapshot.start_reads import StartReads, Stretches, describe

_LARGE = 1 << 20


@pytest.fixture(name="tree")
def _tree(tmp_path: Path) -> Path:
    for name in ("a/one", "a/two", "b/three"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "b/large").write_bytes(bytes(_LARGE))
    return tmp_path


def described(
    tree: Path, *opened: str, left_out: tuple[str, ...] = (), **touched: Stretches
) -> list[tuple[str, Stretches]]:
    found = StartReads(
        opened=[f"{tree}/{name}" for name in opened],
        touched={f"{tree}/b/{name}": each for name, each in touched.items()},
    )
    text = describe(found, written=(), left_out=[f"{tree}/{each}" for each in left_out])
    return [(path.removeprefix(f"{tree}/"), parts) for path, parts in decode(text)]


def test_files_are_in_the_order_of_first_need(tree: Path) -> None:
    names = ["a/two", "b/three", "a/one"]
    assert described(tree, *names, "b/three", "a/two") == [(name, ()) for name in names]


def test_of_a_large_file_the_touched_parts_count_or_all(tree: Path) -> None:
    assert described(tree, "b/large") == [("b/large", ((0, _LARGE),))]
    parts = [(4096, 8192), (_LARGE - 4096, 8192), (_LARGE + 4096, 4096)]
    assert described(tree, "b/large", large=parts) == [("b/large", ((4096, 8192), (_LARGE - 4096, 4096)))]
    assert described(tree, large=[(0, 4096)]) == [("b/large", ((0, 4096),))], "mapped alone"


def test_a_small_file_is_read_whole(tree: Path) -> None:
    assert described(tree, "b/three", three=[(0, 4096)]) == [("b/three", ())]


def test_what_a_start_would_not_find_is_left_out(tree: Path) -> None:
    os.mkfifo(tree / "a/pipe")
    (tree / "a/empty").touch()
    names = ["a/gone", "a/one (deleted)", "a/pipe", "a", "a/empty", "b/three"]
    assert described(tree, *names, left_out=("b/",)) == []
    reads = StartReads(opened=["/proc/self/maps", "/dev/null", "/sys/kernel", "/run/x"], touched={})
    assert describe(reads, (), ()) == ""
    status = (tree / "a/one").stat()
    one = StartReads(opened=[f"{tree}/a/one"], touched={})
    assert describe(one, {(status.st_dev, status.st_ino)}, ()) == "", "made by the server itself"


@pytest.mark.parametrize("name", [os.fsdecode(b"\xff"), "tab\t", "line\n"])
def test_a_name_that_is_no_plain_text_is_left_out(tree: Path, name: str) -> None:
    (tree / "a" / name).write_text("x")
    assert described(tree, f"a/{name}", "a/one") == [("a/one", ())]


@pytest.mark.parametrize(("limit", "at"), [("FILES_LIMIT", 2), ("PARTS_LIMIT", 2), ("TEXT_LIMIT", 200)])
def test_there_is_a_limit(tree: Path, monkeypatch: pytest.MonkeyPatch, limit: str, at: int) -> None:
    long = "a/" + "x" * 150
    (tree / long).write_text("x")
    monkeypatch.setattr(start_reads, limit, at)
    parts = [(0, 4096)] * 3 if limit == "PARTS_LIMIT" else [(0, 4096)]
    names = ["a/one", long] if limit == "TEXT_LIMIT" else ["a/one", "a/two", "b/large"]
    assert described(tree, *names, large=parts) == [(name, ()) for name in names[:-1]]


def test_the_touched_pages_of_mapped_files_are_found(tmp_path: Path) -> None:
    path = tmp_path / "mapped"
    path.write_bytes(bytes(4096 * 4096))
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            mapped.madvise(mmap.MADV_RANDOM)
            assert mapped[4096 * 1000] == mapped[4096 * 3000] == 0
            found = page_tables.touched([os.getpid()], lambda each: each == str(path), joined_bytes=0)
            joined = page_tables.touched([os.getpid()], lambda each: each == str(path), joined_bytes=1 << 30)
    stretches = found[str(path)]
    for page in (1000, 3000):
        assert any(offset <= page * 4096 < offset + length for offset, length in stretches)
    assert sum(length for _, length in stretches) < 4096 * 200, "no more than neighbors"
    assert len(joined[str(path)]) == 1
    assert page_tables.touched([1 << 22], lambda _: True, joined_bytes=0) == {}, "a process that has ended"
