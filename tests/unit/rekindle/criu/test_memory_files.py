# SPDX-License-Identifier: Apache-2.0
"""Memory moves into files, and a process that maps them finds every byte where it was."""

import os
import random
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rekindle.cell import MEMORY_PLACE
from rekindle.criu import memory_files
from rekindle.criu.image_files import (
    FILES_MAGIC,
    MM_MAGIC,
    PE_PRESENT,
    Stretch,
    read_messages,
    write_messages,
    write_pagemap,
)
from rekindle.criu.memory_files import (
    LEAST_PAGES,
    are_ambiguous,
    copy_back,
    forget_memory_files,
    mapped_ranges,
    move_memory,
)
from rekindle.criu.protobuf import content, encode_fields, integer, read_fields
from rekindle.errors import FormatError
from tests.samples.dump import (
    BASE,
    PAGE,
    VMA_FILE_PRIVATE,
    ZERO,
    entry,
    mapping,
    memory,
    number,
    write_dump,
)

ANONYMOUS = 0x22  # MAP_PRIVATE | MAP_ANONYMOUS
PRIVATE_FILE = 1 << 6
LARGE = LEAST_PAGES + 3


def page(value: int) -> bytes:
    return value.to_bytes(4, "little") * (PAGE // 4)


def make_dump(
    place: Path, mappings: Sequence[bytes], pages: dict[int, bytes], pid: int = 7
) -> dict[int, bytes]:
    """A dump with these pages, by address; it has one file already."""
    place.mkdir(exist_ok=True)
    entries = [entry(address, 1) for address in sorted(pages)]
    write_dump(place, mappings, entries, b"".join(pages[address] for address in sorted(pages)), pid)
    write_messages(place / "files.img", FILES_MAGIC, [number(1, 1) + number(2, 41)])
    return pages


def mapped(criu: Path, files: Path, pid: int = 7) -> dict[int, bytes]:
    """What a process finds that is restored with its memory file mapped: pages by address, without zeros."""
    path = criu / f"mm-{pid}.img"
    ids = {}
    for message in read_messages(criu / "files.img", FILES_MAGIC):
        fields = read_fields(message, path)
        if regular := content(fields, 3):
            name = content(read_fields(regular, path), 6)
            assert name is not None
            ids[integer(fields, 2, path)] = name.decode()
            assert integer(read_fields(regular, path), 8, path) == (files / str(pid)).stat().st_size
    found: dict[int, bytes] = {}
    for number_, _, value in read_fields(next(read_messages(path, MM_MAGIC)), path):
        if number_ != 14:
            continue
        assert isinstance(value, bytes)
        fields = read_fields(value, path)
        start, end, offset = (integer(fields, each, path) for each in (1, 2, 3))
        if integer(fields, 7, path) & PRIVATE_FILE:
            assert ids[integer(fields, 4, path)] == f"{MEMORY_PLACE}/{pid}"
            assert not integer(fields, 6, path) & 0x20
            data = (files / str(pid)).read_bytes()[offset : offset + end - start]
            assert len(data) == end - start, "the mapping ends within the file"
            found |= {start + at: data[at : at + PAGE] for at in range(0, len(data), PAGE)}
    return {address: data for address, data in (found | memory(criu)).items() if data != ZERO}


def test_a_large_mapping_moves_and_a_small_one_stays(tmp_path: Path) -> None:
    criu, files = tmp_path / "criu", tmp_path / "memory"
    files.mkdir()
    small = BASE + 1000 * PAGE
    pages = {BASE + i * PAGE: page(i + 1) for i in range(LARGE)} | {small: page(99)}
    mappings = [
        mapping(BASE, BASE + 500 * PAGE, flags=ANONYMOUS),
        mapping(small, small + 4 * PAGE, flags=ANONYMOUS),
    ]
    make_dump(criu, mappings, pages)
    (moved,) = move_memory(criu, files)
    assert (moved.name, moved.data_bytes) == ("7", LARGE * PAGE)
    assert [(each.start, each.end) for each in moved.ranges] == [(BASE, BASE + 500 * PAGE)]
    assert memory(criu) == {small: page(99)}
    assert mapped(criu, files) == pages
    assert (files / "7").stat().st_mode & 0o777 == 0o600
    assert (files / "7").stat().st_blocks * 512 < 3 * LARGE * PAGE, "what is zero is a hole"


@pytest.mark.parametrize(
    ("flags", "status", "more"),
    [
        (ANONYMOUS | 0x100, 1 << 9, b""),  # grows down
        (ANONYMOUS | 0x2000, 1 << 9, b""),  # locked
        (ANONYMOUS | 0x40000, 1 << 9, b""),  # huge pages
        (ANONYMOUS, 1 << 9 | 1 << 1, b""),  # a stack
        (ANONYMOUS, 1 << 9 | 1 << 13, b""),  # an AIO ring
        (ANONYMOUS, 1 << 9, number(5, 7)),  # run-time code
        (ANONYMOUS, 1 << 9, number(9, 1 << 18)),  # MADV_WIPEONFORK
        (2, VMA_FILE_PRIVATE, b""),
    ],
)
def test_what_is_not_plain_memory_stays(tmp_path: Path, flags: int, status: int, more: bytes) -> None:
    criu, files = tmp_path / "criu", tmp_path / "memory"
    files.mkdir()
    pages = {BASE + i * PAGE: page(i + 1) for i in range(LARGE)}
    make_dump(criu, [mapping(BASE, BASE + LARGE * PAGE, status, flags) + more], pages)
    before = (criu / "mm-7.img").read_bytes()
    assert move_memory(criu, files) == []
    assert (criu / "mm-7.img").read_bytes() == before
    assert memory(criu) == pages
    assert not list(files.iterdir())


def test_a_mapping_with_guard_pages_stays(tmp_path: Path) -> None:
    """CRIU lists guards behind all mappings, in no order (glibc 2.42 makes one for each thread)."""
    criu, files = tmp_path / "criu", tmp_path / "memory"
    files.mkdir()
    pages = {BASE + i * PAGE: page(i + 1) for i in range(LARGE)}
    mappings = [
        mapping(BASE, BASE + LARGE * PAGE, flags=ANONYMOUS),
        mapping(BASE + PAGE, BASE + 2 * PAGE, 1 << 16, 0),
    ]
    make_dump(criu, mappings, pages)
    assert move_memory(criu, files) == []
    assert memory(criu) == pages


def test_processes_have_a_file_each(tmp_path: Path) -> None:
    criu, files = tmp_path / "criu", tmp_path / "memory"
    files.mkdir()
    one = {BASE + i * PAGE: page(i + 1) for i in range(LARGE)}
    make_dump(criu, [mapping(BASE, BASE + LARGE * PAGE, flags=ANONYMOUS)], one)
    for kind in ("mm", "pagemap"):
        (criu / f"{kind}-8.img").write_bytes((criu / f"{kind}-7.img").read_bytes())
    shutil.copy(criu / "pages-1.img", criu / "pages-2.img")
    from rekindle.criu.image_files import read_pagemap, write_pagemap

    write_pagemap(criu / "pagemap-8.img", 2, read_pagemap(criu / "pagemap-8.img")[1])
    assert [each.name for each in move_memory(criu, files)] == ["7", "8"]
    assert (files / "7").read_bytes() == (files / "8").read_bytes()
    assert (files / "7").stat().st_ino != (files / "8").stat().st_ino


def fork(criu: Path, pages: dict[int, bytes], offset: int = 0) -> None:
    """Add a process 8, which maps the memory file of process 7 and has written these pages."""
    path = criu / "mm-7.img"
    fields = read_fields(next(read_messages(path, MM_MAGIC)), path)
    (entry,) = [value for number, _, value in fields if number == 14]
    assert isinstance(entry, bytes)
    moved = [(n, w, v + offset if n == 3 else v) for n, w, v in read_fields(entry, path)]  # type: ignore[operator]
    write_messages(criu / "mm-8.img", MM_MAGIC, [encode_fields([(14, 2, encode_fields(moved))])])
    stretches = [Stretch(address=address, pages=1, flags=PE_PRESENT) for address in sorted(pages)]
    write_pagemap(criu / "pagemap-8.img", 2, stretches)
    (criu / "pages-2.img").write_bytes(b"".join(pages[address] for address in sorted(pages)))


def test_a_process_may_map_the_file_of_its_parent(tmp_path: Path) -> None:
    """After a restore, a fork shares the memory file of its parent, which may end before it."""
    criu, files, target = tmp_path / "criu", tmp_path / "memory", tmp_path / "copied"
    for directory in (files, target):
        directory.mkdir()
    pages = {BASE + i * PAGE: page(i + 1) for i in range(LARGE)}
    make_dump(criu, [mapping(BASE, BASE + LARGE * PAGE, flags=ANONYMOUS)], pages)
    assert [each.name for each in move_memory(criu, files)] == ["7"]
    fork(criu, {BASE + 3 * PAGE: page(99)})
    ranges = mapped_ranges(criu)["7"]
    assert [(each.start, each.end) for each in ranges] == [(BASE, BASE + LARGE * PAGE)] * 2
    assert not are_ambiguous(ranges)
    for kind in ("mm", "pagemap"):
        (criu / f"{kind}-7.img").unlink()
    copy_back(criu, files, target)
    pages[BASE + 3 * PAGE] = page(99)
    assert memory(target, "pagemap-8.img") == pages
    forget_memory_files(target)
    assert not mapped_ranges(target)


def test_processes_that_map_different_parts_of_a_file_at_one_address_are_noticed(tmp_path: Path) -> None:
    """CRIU 4.2.1 would give the child the pages of its parent."""
    criu, files = tmp_path / "criu", tmp_path / "memory"
    files.mkdir()
    pages = {BASE + i * PAGE: page(i + 1) for i in range(LARGE)}
    make_dump(criu, [mapping(BASE, BASE + LARGE * PAGE, flags=ANONYMOUS)], pages)
    move_memory(criu, files)
    fork(criu, {}, offset=PAGE)
    assert are_ambiguous(mapped_ranges(criu)["7"])


def test_a_pages_file_that_is_too_short_is_refused(tmp_path: Path) -> None:
    criu, files = tmp_path / "criu", tmp_path / "memory"
    files.mkdir()
    pages = {BASE + i * PAGE: page(i + 1) for i in range(LARGE)}
    make_dump(criu, [mapping(BASE, BASE + LARGE * PAGE, flags=ANONYMOUS)], pages)
    os.truncate(criu / "pages-1.img", (LARGE - 1) * PAGE)
    with pytest.raises(FormatError):
        move_memory(criu, files)


@given(data=st.data())
def test_any_memory_comes_back_mapped_and_copied(data: st.DataObject, tmp_path: Path) -> None:
    """Random mappings, pages and thresholds; the mapped process and the copied one have the same bytes."""
    place = tmp_path / os.urandom(8).hex()
    criu, files, target = place / "criu", place / "memory", place / "copied"
    for directory in (place, files, target):
        directory.mkdir()
    rng = random.Random(data.draw(st.integers(0, 1 << 32)))
    address, mappings, pages = BASE, [], {}
    for _ in range(data.draw(st.integers(1, 6))):
        address += rng.choice([0, PAGE, 513 * PAGE])
        length = rng.randint(1, 40)
        plain = rng.random() < 0.8
        status, flags = (1 << 9, ANONYMOUS) if plain else (VMA_FILE_PRIVATE, 2)
        mappings.append(mapping(address, address + length * PAGE, status, flags))
        for index in range(length):
            if rng.random() < 0.6:
                pages[address + index * PAGE] = page(rng.randint(1, 1 << 30))
        address += length * PAGE
    make_dump(criu, mappings, pages)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory_files, "LEAST_PAGES", data.draw(st.integers(1, 20)))
        patch.setattr(memory_files, "_COPY_BYTES", data.draw(st.sampled_from([PAGE, 7 * PAGE, 4 << 20])))
        move_memory(criu, files)
    assert mapped(criu, files) == pages if (files / "7").exists() else memory(criu) == pages
    copy_back(criu, files, target)
    assert memory(target) == pages
    shutil.rmtree(place)
