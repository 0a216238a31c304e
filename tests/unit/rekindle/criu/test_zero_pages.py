# SPDX-License-Identifier: Apache-2.0
"""Zero pages leave a dump where an absent page reads as zeros, and nowhere else."""

import contextlib
import os
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rekindle.criu import image_files, zero_pages
from rekindle.criu.image_files import (
    MAP_HUGETLB,
    MM_MAGIC,
    PAGEMAP_MAGIC,
    PE_PRESENT,
    VMA_AIORING,
    VMA_ANON_PRIVATE,
    Stretch,
    read_mappings,
    read_messages,
    read_pagemap,
)
from rekindle.errors import FormatError
from tests.samples.dump import (
    BASE,
    ONE,
    PAGE,
    PE_LAZY,
    PE_PARENT,
    VMA_FILE_PRIVATE,
    ZERO,
    blob,
    entry,
    image,
    mapping,
    memory,
    mm,
    number,
    pagemap,
    varint,
    write_dump,
)
from tests.samples.gauges import memory_peak, writable_up_to


def stretches(dump: Path, name: str = "pagemap-7.img") -> list[tuple[int, int, int]]:
    return [(s.address, s.pages, s.flags) for s in read_pagemap(dump / name)[1]]


def test_zero_pages_of_anonymous_memory_go(tmp_path: Path) -> None:
    write_dump(tmp_path, [mapping(BASE, BASE + 4 * PAGE)], [entry(BASE, 4)], ZERO + ONE + ZERO + ONE)
    counts = zero_pages.drop(tmp_path)
    assert (counts.kept, counts.dropped) == (2, 2)
    assert (tmp_path / "pages-1.img").read_bytes() == ONE + ONE
    assert stretches(tmp_path) == [
        (BASE + PAGE, 1, PE_PRESENT),
        (BASE + 3 * PAGE, 1, PE_PRESENT),
    ]


def test_a_page_with_one_byte_stays(tmp_path: Path) -> None:
    first, last = b"\1" + ZERO[1:], ZERO[1:] + b"\1"
    write_dump(tmp_path, [mapping(BASE, BASE + 2 * PAGE)], [entry(BASE, 2)], first + last)
    assert zero_pages.drop(tmp_path).dropped == 0
    assert (tmp_path / "pages-1.img").read_bytes() == first + last


def test_a_dump_of_zeros_keeps_no_page(tmp_path: Path) -> None:
    write_dump(tmp_path, [mapping(BASE, BASE + 9 * PAGE)], [entry(BASE, 9)], ZERO * 9)
    counts = zero_pages.drop(tmp_path)
    assert (counts.kept, counts.dropped) == (0, 9)
    assert stretches(tmp_path) == []
    assert (tmp_path / "pages-1.img").stat().st_size == 0


def test_a_dump_without_pages_stays_so(tmp_path: Path) -> None:
    write_dump(tmp_path, [], [], b"")
    counts = zero_pages.drop(tmp_path)
    assert (counts.kept, counts.dropped) == (0, 0)


@pytest.mark.parametrize(
    ("status", "flags"),
    [
        (VMA_FILE_PRIVATE, 0),
        (0, 0),
        (VMA_ANON_PRIVATE, MAP_HUGETLB),
        (VMA_ANON_PRIVATE | VMA_AIORING, 0),
    ],
    ids=["private file", "no status", "huge pages", "aio ring"],
)
def test_zero_pages_of_other_mappings_stay(tmp_path: Path, status: int, flags: int) -> None:
    write_dump(tmp_path, [mapping(BASE, BASE + 3 * PAGE, status, flags)], [entry(BASE, 3)], ZERO + ONE + ZERO)
    assert zero_pages.drop(tmp_path).dropped == 0
    assert (tmp_path / "pages-1.img").read_bytes() == ZERO + ONE + ZERO
    assert stretches(tmp_path) == [(BASE, 3, PE_PRESENT)]


def test_zero_pages_outside_every_mapping_stay(tmp_path: Path) -> None:
    write_dump(tmp_path, [mapping(BASE, BASE + PAGE)], [entry(BASE + 8 * PAGE, 1)], ZERO)
    assert zero_pages.drop(tmp_path).dropped == 0


def test_shared_memory_loses_all_its_zero_pages(tmp_path: Path) -> None:
    (tmp_path / "pagemap-shmem-99.img").write_bytes(pagemap(entry(0, 3)))
    (tmp_path / "pages-1.img").write_bytes(ZERO + ONE + ZERO)
    counts = zero_pages.drop(tmp_path)
    assert (counts.kept, counts.dropped) == (1, 2)
    assert stretches(tmp_path, "pagemap-shmem-99.img") == [(PAGE, 1, PE_PRESENT)]


def test_a_stretch_over_the_border_of_two_mappings_is_cut_there(tmp_path: Path) -> None:
    file, anonymous = mapping(BASE, BASE + 2 * PAGE, VMA_FILE_PRIVATE), (BASE + 2 * PAGE, BASE + 4 * PAGE)
    write_dump(tmp_path, [file, mapping(*anonymous)], [entry(BASE, 6)], ZERO * 5 + ONE)
    assert zero_pages.drop(tmp_path).dropped == 2
    assert stretches(tmp_path) == [(BASE, 2, PE_PRESENT), (BASE + 4 * PAGE, 2, PE_PRESENT)]
    assert (tmp_path / "pages-1.img").read_bytes() == ZERO * 3 + ONE


def test_absent_stretches_stay_and_take_no_pages(tmp_path: Path) -> None:
    entries = [entry(BASE, 2, PE_PARENT), entry(BASE + 2 * PAGE, 2), entry(BASE + 4 * PAGE, 1, PE_LAZY)]
    write_dump(tmp_path, [mapping(BASE, BASE + 5 * PAGE)], entries, ZERO + ONE)
    counts = zero_pages.drop(tmp_path)
    assert (counts.kept, counts.dropped) == (1, 1)
    assert stretches(tmp_path) == [
        (BASE, 2, PE_PARENT),
        (BASE + 3 * PAGE, 1, PE_PRESENT),
        (BASE + 4 * PAGE, 1, PE_LAZY),
    ]


def test_other_flags_of_present_pages_are_kept(tmp_path: Path) -> None:
    entries = [entry(BASE, 1), entry(BASE + PAGE, 2, PE_PRESENT | PE_LAZY)]
    write_dump(tmp_path, [mapping(BASE, BASE + 3 * PAGE)], entries, ONE + ONE + ZERO)
    assert zero_pages.drop(tmp_path).dropped == 1
    assert stretches(tmp_path) == [(BASE, 1, PE_PRESENT), (BASE + PAGE, 1, PE_PRESENT | PE_LAZY)]


def test_stretches_longer_than_the_buffer_are_whole_again_afterwards(tmp_path: Path) -> None:
    count = 2600  # more than 10 MiB
    order = random.Random(1)
    kept = sorted([*order.sample(range(count), 40), 1022, 1023, 1024, 1025, 2047, 2048])
    pages = bytearray(count * PAGE)
    for index in kept:
        pages[index * PAGE : (index + 1) * PAGE] = order.randbytes(PAGE)
    write_dump(tmp_path, [mapping(BASE, BASE + count * PAGE)], [entry(BASE, count)], bytes(pages))
    zero_pages.drop(tmp_path)
    assert memory(tmp_path) == {
        BASE + index * PAGE: bytes(pages[index * PAGE : (index + 1) * PAGE]) for index in set(kept)
    }
    starts = [(address - BASE) // PAGE for address, _, _ in stretches(tmp_path)]
    assert 1022 in starts  # 1022 to 1025 go over the buffer's end, and are one stretch
    assert 1024 not in starts


def test_many_tasks_have_their_own_pages(tmp_path: Path) -> None:
    for pid, pages in ((7, ZERO + ONE), (8, ONE + ZERO)):
        (tmp_path / f"mm-{pid}.img").write_bytes(mm(mapping(BASE, BASE + 2 * PAGE)))
        (tmp_path / f"pagemap-{pid}.img").write_bytes(pagemap(entry(BASE, 2), pages_id=pid))
        (tmp_path / f"pages-{pid}.img").write_bytes(pages)
    counts = zero_pages.drop(tmp_path)
    assert (counts.kept, counts.dropped) == (2, 2)
    assert memory(tmp_path, "pagemap-7.img") == {BASE + PAGE: ONE}
    assert memory(tmp_path, "pagemap-8.img") == {BASE: ONE}


def test_a_second_time_changes_nothing(tmp_path: Path) -> None:
    write_dump(tmp_path, [mapping(BASE, BASE + 4 * PAGE)], [entry(BASE, 4)], ZERO + ONE + ZERO + ONE)
    zero_pages.drop(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert zero_pages.drop(tmp_path).dropped == 0
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_old_page_count_is_read(tmp_path: Path) -> None:
    old = number(1, BASE) + number(2, 2) + number(4, PE_PRESENT)
    write_dump(tmp_path, [mapping(BASE, BASE + 2 * PAGE)], [old], ZERO + ONE)
    assert zero_pages.drop(tmp_path).dropped == 1
    assert memory(tmp_path) == {BASE + PAGE: ONE}


def test_entries_without_flags_are_present(tmp_path: Path) -> None:
    path = tmp_path / "pagemap-7.img"
    path.write_bytes(pagemap(number(1, BASE) + number(2, 3)))
    assert read_pagemap(path) == (1, [Stretch(address=BASE, pages=3, flags=PE_PRESENT)])


def test_unknown_fields_are_passed_over(tmp_path: Path) -> None:
    strange = blob(200, b"text") + varint(201 << 3 | 5) + b"1234" + varint(202 << 3 | 1) + b"12345678"
    path = tmp_path / "pagemap-7.img"
    path.write_bytes(pagemap(strange + entry(BASE, 3) + strange))
    assert read_pagemap(path)[1] == [Stretch(address=BASE, pages=3, flags=PE_PRESENT)]


def test_writing_and_reading_a_pagemap_agree(tmp_path: Path) -> None:
    path = tmp_path / "pagemap-7.img"
    wanted = [Stretch(address=0, pages=1, flags=4), Stretch(address=(1 << 64) - PAGE, pages=1, flags=6)]
    image_files.write_pagemap(path, 12345, wanted)
    assert read_pagemap(path) == (12345, wanted)


@dataclass(frozen=True)
class Memory:
    """Mappings one after the other, each (pages, status, flags), and their pages; None is not dumped."""

    mappings: list[tuple[int, int, int]]
    pages: list[bytes | None]


KINDS = [
    (VMA_ANON_PRIVATE, 0),
    (VMA_FILE_PRIVATE, 0),
    (VMA_ANON_PRIVATE, MAP_HUGETLB),
    (VMA_ANON_PRIVATE | VMA_AIORING, 0),
]


@st.composite
def memories(draw: st.DrawFn) -> Memory:
    mappings, pages = [], []
    for _ in range(draw(st.integers(1, 6))):
        status, flags = draw(st.sampled_from(KINDS))
        content = draw(
            st.lists(st.sampled_from([None, ZERO, ZERO, ONE, b"\2" * PAGE]), min_size=1, max_size=8)
        )
        mappings.append((len(content), status, flags))
        pages += content
    return Memory(mappings, pages)


@given(memories(), st.sampled_from([PAGE, 2 * PAGE, 4 << 20]))
@example(Memory([(1, VMA_ANON_PRIVATE, 0), (1, VMA_FILE_PRIVATE, 0)], [ZERO, ZERO]), PAGE)
def test_restored_memory_is_what_was_dumped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: Memory, buffer_bytes: int
) -> None:
    monkeypatch.setattr(zero_pages, "_READ_BYTES", buffer_bytes)
    before: dict[int, bytes] = {}
    vmas, entries = [], []
    droppable: set[int] = set()
    address = BASE
    for count, status, flags in layout.mappings:
        vmas.append(mapping(address, address + count * PAGE, status, flags))
        if status == VMA_ANON_PRIVATE and not flags:
            droppable |= {address + index * PAGE for index in range(count)}
        address += count * PAGE
    run = 0
    for index, page in enumerate([*layout.pages, None]):
        if page is not None:
            before[BASE + index * PAGE] = page
            run += 1
        elif run:
            entries.append(entry(BASE + (index - run) * PAGE, run))
            run = 0
    write_dump(tmp_path, vmas, entries, b"".join(before.values()))
    counts = zero_pages.drop(tmp_path)
    after = memory(tmp_path)
    assert {**dict.fromkeys(before.keys() & droppable, ZERO), **after} == before
    assert ZERO not in [page for where, page in after.items() if where in droppable]
    assert (counts.kept, counts.dropped) == (len(after), len(before) - len(after))


Read = Callable[[Path], object]
READERS: dict[str, tuple[Read, bytes]] = {
    "pagemap": (read_pagemap, pagemap(entry(BASE, 2), entry(BASE + 2 * PAGE, 1))),
    "mm": (read_mappings, mm(mapping(BASE, BASE + PAGE), mapping(BASE + PAGE, BASE + 3 * PAGE))),
}


@pytest.mark.parametrize("kind", READERS)
def test_a_file_cut_off_anywhere_is_refused(tmp_path: Path, kind: str) -> None:
    read, whole = READERS[kind]
    path = tmp_path / f"{kind}-7.img"
    # A file may end after any of its messages: a pagemap's pages file will not fit then.
    ends = set()
    at = 8
    while at < len(whole):
        at += 4 + struct.unpack_from("<I", whole, at)[0]
        ends.add(at)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        if length in ends:
            read(path)
        else:
            with pytest.raises(FormatError):
                read(path)


def bad(*entries: bytes) -> bytes:
    return pagemap(*entries)


BAD_PAGEMAPS = {
    "empty": b"",
    "text": b"#!/bin/sh\n",
    "another image's magic": mm(),
    "another version's magic": struct.pack("<II", 0x55105940, PAGEMAP_MAGIC) + pagemap()[8:],
    "magic alone": pagemap()[:8],
    "head without a pages id": image(PAGEMAP_MAGIC, number(2, 1)),
    "pages id that is text": image(PAGEMAP_MAGIC, blob(1, b"../../etc")),
    "message of 4 GiB": pagemap() + b"\xff\xff\xff\xff",
    "message of 64 MiB that is not there": pagemap() + struct.pack("<I", 64 << 20),
    "varint of eleven bytes": bad(varint(1 << 3) + b"\xff" * 10 + b"\1"),
    "varint that ends in the middle": bad(varint(1 << 3) + b"\xff\xff"),
    "field of more bytes than there are": bad(entry(BASE, 1) + blob(9, b"abc")[:-1]),
    "field of 16 EiB": bad(entry(BASE, 1) + varint(9 << 3 | 2) + varint((1 << 64) - 1) + b"x"),
    "fixed field cut off": bad(entry(BASE, 1) + varint(9 << 3 | 1) + b"1234"),
    "group": bad(entry(BASE, 1) + varint(9 << 3 | 3)),
    "end of a group": bad(entry(BASE, 1) + varint(9 << 3 | 4)),
    "wire type 6": bad(entry(BASE, 1) + varint(9 << 3 | 6)),
    "wire type 7": bad(entry(BASE, 1) + varint(9 << 3 | 7)),
    "no address": bad(number(4, PE_PRESENT) + number(5, 1)),
    "address that is text": bad(blob(1, b"here") + number(5, 1)),
    "address within a page": bad(entry(BASE + 1, 1)),
    "no page count": bad(number(1, BASE) + number(4, PE_PRESENT)),
    "no pages": bad(entry(BASE, 0)),
    "as many pages as there are not": bad(entry(BASE, 1 << 40)),
    "flags that are text": bad(number(1, BASE) + blob(4, b"x") + number(5, 1)),
    "pages in a parent dump": bad(entry(BASE, 1) + number(3, 1)),
    "the same pages twice": bad(entry(BASE, 1), entry(BASE, 1)),
    "overlapping entries": bad(entry(BASE, 3), entry(BASE + 2 * PAGE, 3)),
    "unordered entries": bad(entry(BASE + 8 * PAGE, 1), entry(BASE, 1)),
    "entry without fields": bad(b""),
}


@pytest.mark.parametrize("content", BAD_PAGEMAPS.values(), ids=BAD_PAGEMAPS)
def test_a_malformed_pagemap_is_refused(tmp_path: Path, content: bytes) -> None:
    write_dump(tmp_path, [mapping(BASE, BASE + 9 * PAGE)], [], ONE)
    (tmp_path / "pagemap-7.img").write_bytes(content)
    with memory_peak() as peak, pytest.raises(FormatError):
        zero_pages.drop(tmp_path)
    assert peak[0] < 80 << 20
    assert (tmp_path / "pages-1.img").read_bytes() == ONE


BAD_MMS = {
    "empty": b"",
    "a pagemap": pagemap(),
    "magic alone": image(MM_MAGIC),
    "no message but a length": image(MM_MAGIC) + struct.pack("<I", 5),
    "mapping without a start": mm(number(2, BASE) + number(6, 0) + number(7, 0)),
    "mapping without a status": mm(number(1, BASE) + number(2, BASE + PAGE) + number(6, 0)),
    "mapping of nothing": mm(mapping(BASE, BASE)),
    "mapping backwards": mm(mapping(BASE + PAGE, BASE)),
    "mapping of half a page": mm(mapping(BASE, BASE + 100)),
    "mapping from within a page": mm(mapping(BASE + 8, BASE + PAGE)),
    "overlapping mappings": mm(mapping(BASE, BASE + 2 * PAGE), mapping(BASE + PAGE, BASE + 3 * PAGE)),
    "the same mapping twice": mm(mapping(BASE, BASE + PAGE), mapping(BASE, BASE + PAGE, VMA_FILE_PRIVATE)),
    "unordered mappings": mm(mapping(BASE + PAGE, BASE + 2 * PAGE), mapping(BASE, BASE + PAGE)),
    "mapping that is no message": mm(b"\xff\xff"),
    "mapping with a group": mm(mapping(BASE, BASE + PAGE) + varint(9 << 3 | 3)),
    "status that is text": mm(mapping(BASE, BASE + PAGE) + blob(7, b"x")),
}


@pytest.mark.parametrize("content", BAD_MMS.values(), ids=BAD_MMS)
def test_a_malformed_mm_is_refused(tmp_path: Path, content: bytes) -> None:
    write_dump(tmp_path, [], [entry(BASE, 1)], ONE)
    (tmp_path / "mm-7.img").write_bytes(content)
    with pytest.raises(FormatError):
        zero_pages.drop(tmp_path)
    assert (tmp_path / "pages-1.img").read_bytes() == ONE


@pytest.mark.parametrize("pages", [b"", ONE, ONE * 2 + b"x", ONE * 2 + ONE[1:], ONE * 4])
def test_a_pages_file_of_another_size_is_refused(tmp_path: Path, pages: bytes) -> None:
    write_dump(tmp_path, [mapping(BASE, BASE + 3 * PAGE)], [entry(BASE, 3)], pages)
    with pytest.raises(FormatError):
        zero_pages.drop(tmp_path)
    assert (tmp_path / "pages-1.img").read_bytes() == pages


@pytest.mark.parametrize("name", ["pages-1.img", "mm-7.img"])
def test_a_missing_file_is_refused(tmp_path: Path, name: str) -> None:
    write_dump(tmp_path, [mapping(BASE, BASE + PAGE)], [entry(BASE, 1)], ONE)
    (tmp_path / name).unlink()
    with pytest.raises(FormatError):
        zero_pages.drop(tmp_path)


def test_memory_over_the_end_of_the_address_space_is_refused(tmp_path: Path) -> None:
    write_dump(tmp_path, [], [entry((1 << 64) - PAGE, 2)], ONE * 2)
    with pytest.raises(FormatError):
        zero_pages.drop(tmp_path)


def test_one_malformed_task_leaves_the_pages_of_all(tmp_path: Path) -> None:
    write_dump(tmp_path, [mapping(BASE, BASE + PAGE)], [entry(BASE, 1)], ZERO)
    (tmp_path / "pagemap-8.img").write_bytes(b"")
    with pytest.raises(FormatError):
        zero_pages.drop(tmp_path)
    assert (tmp_path / "pages-1.img").read_bytes() == ZERO


def test_a_short_write_is_no_success(tmp_path: Path) -> None:
    write_dump(tmp_path, [mapping(BASE, BASE + 3 * PAGE)], [entry(BASE, 3)], ZERO + ONE + ONE)
    with writable_up_to(6000), pytest.raises(OSError):
        zero_pages.drop(tmp_path)


def test_a_huge_dump_is_compacted_in_bounded_memory(tmp_path: Path) -> None:
    pages = 1 << 15  # 128 MiB
    write_dump(tmp_path, [mapping(BASE, BASE + pages * PAGE)], [entry(BASE, pages)], b"")
    os.truncate(tmp_path / "pages-1.img", pages * PAGE)
    with memory_peak() as peak:
        counts = zero_pages.drop(tmp_path)
    assert (counts.kept, counts.dropped) == (0, pages)
    assert peak[0] < 40 << 20


@given(st.binary(max_size=200), st.sampled_from(sorted(READERS)), st.booleans())
def test_random_bytes_give_a_value_or_a_format_error(
    tmp_path: Path, content: bytes, kind: str, framed: bool
) -> None:
    read, whole = READERS[kind]
    path = tmp_path / f"{kind}-7.img"
    path.write_bytes(whole[:8] + (struct.pack("<I", len(content)) if framed else b"") + content)
    with contextlib.suppress(FormatError):
        read(path)


@given(st.data(), st.sampled_from(sorted(READERS)))
def test_changed_bytes_give_a_value_or_a_format_error(tmp_path: Path, data: st.DataObject, kind: str) -> None:
    read, whole = READERS[kind]
    spoiled = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        spoiled[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / f"{kind}-7.img"
    path.write_bytes(spoiled)
    with contextlib.suppress(FormatError):
        read(path)


@given(st.lists(st.binary(max_size=30), max_size=5))
def test_messages_are_read_as_they_were_written(tmp_path: Path, messages: list[bytes]) -> None:
    path = tmp_path / "any.img"
    path.write_bytes(image(MM_MAGIC, *messages))
    assert list(read_messages(path, MM_MAGIC)) == messages
