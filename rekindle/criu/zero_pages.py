# SPDX-License-Identifier: Apache-2.0
"""Drop zero pages from a dump."""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from msgspec import Struct

from rekindle.criu.image_files import (
    ADDRESS_END,
    PE_PRESENT,
    VMA_ANON_PRIVATE,
    Mapping,
    Stretch,
    append_stretch,
    read_mappings,
    read_pagemap,
    write_pagemap,
)
from rekindle.errors import FormatError
from rekindle.files import PAGE_BYTES, nonzero_runs, write_at

_READ_BYTES = 4 << 20


class ZeroPages(Struct, frozen=True, kw_only=True):
    """The number of pages kept in a dump and of zero pages dropped from it."""

    kept: int
    dropped: int


def drop(dump: Path) -> ZeroPages:
    """Remove the zero pages of anonymous memory from a dump, in place.

    Not atomic: an interruption destroys the dump. Raises FormatError for malformed image files; all of them
    are checked before the first pages file is written.
    """
    plans = [_plan(dump, path) for path in sorted(dump.glob("pagemap-*.img"))]
    kept = dropped = 0
    for plan in plans:
        left, count = _compact(plan.pages, plan.stretches, plan.droppable)
        write_pagemap(plan.pagemap, plan.pages_id, left)
        dropped += count
        kept += sum(s.pages for s in left if s.flags & PE_PRESENT)
    return ZeroPages(kept=kept, dropped=dropped)


class _Plan(Struct, frozen=True, kw_only=True):
    """One pagemap, its pages, and the mappings whose zero pages may be dropped."""

    pagemap: Path
    pages: Path
    pages_id: int
    stretches: Sequence[Stretch]
    droppable: Sequence[Mapping]


def _plan(dump: Path, pagemap: Path) -> _Plan:
    pages_id, stretches = read_pagemap(pagemap)
    pages = dump / f"pages-{pages_id}.img"
    expected = sum(s.pages for s in stretches if s.flags & PE_PRESENT) * PAGE_BYTES
    if not pages.exists() or pages.stat().st_size != expected:
        raise FormatError(f"{pages.name} does not have the size that {pagemap.name} implies")
    if match := re.fullmatch(r"pagemap-(\d+)\.img", pagemap.name):
        droppable = [m for m in read_mappings(dump / f"mm-{match[1]}.img") if m.reads_zero_when_absent]
    else:  # pagemap-shmem-*: shared anonymous memory, which is created empty and so reads as zeros
        droppable = [Mapping(start=0, end=ADDRESS_END, flags=0, status=VMA_ANON_PRIVATE)]
    return _Plan(pagemap=pagemap, pages=pages, pages_id=pages_id, stretches=stretches, droppable=droppable)


def _compact(
    pages: Path, stretches: Sequence[Stretch], droppable: Sequence[Mapping]
) -> tuple[list[Stretch], int]:
    """Move the kept pages to the front of the file and truncate it."""
    left: list[Stretch] = []
    dropped = read_at = write_to = 0
    buffer = memoryview(bytearray(_READ_BYTES))
    with open(pages, "r+b", buffering=0) as file:
        for piece in _pieces(stretches, droppable):
            stretch, may_drop = piece
            if not stretch.flags & PE_PRESENT:
                left.append(stretch)
                continue
            length = stretch.pages * PAGE_BYTES
            content = buffer[:length]
            if os.preadv(file.fileno(), [content], read_at) != length:
                raise FormatError(f"{pages.name} is shorter than its pagemap implies")
            read_at += length
            for start, end in nonzero_runs(bytes(content)) if may_drop else [(0, length)]:
                if write_to != read_at - length + start:  # in most files, the first pages stay in place
                    write_at(file.fileno(), content[start:end], write_to)
                write_to += end - start
                kept = (end - start) // PAGE_BYTES
                new = Stretch(address=stretch.address + start, pages=kept, flags=stretch.flags)
                append_stretch(left, new)
                dropped -= kept
            dropped += stretch.pages
        file.truncate(write_to)
    return left, dropped


def _pieces(stretches: Sequence[Stretch], droppable: Sequence[Mapping]) -> Iterator[tuple[Stretch, bool]]:
    """Split stretches at the borders of droppable mappings, into pieces no larger than the buffer.

    Yields each piece and whether its zero pages may be dropped.
    """
    mappings = iter(sorted(droppable, key=lambda m: m.start))
    mapping = next(mappings, None)
    for stretch in stretches:
        if not stretch.flags & PE_PRESENT:
            yield stretch, False
            continue
        address, end = stretch.address, stretch.address + stretch.pages * PAGE_BYTES
        while address < end:
            while mapping and mapping.end <= address:
                mapping = next(mappings, None)
            inside = mapping is not None and mapping.start <= address
            border = end if mapping is None else mapping.end if inside else mapping.start
            until = min(end, border, address + _READ_BYTES)
            pages = (until - address) // PAGE_BYTES
            yield Stretch(address=address, pages=pages, flags=stretch.flags), inside
            address = until
