# SPDX-License-Identifier: Apache-2.0
"""Describe for the record what a start of the server reads: files and parts of files, in order.

Files are those that the processes that still run have opened, in the order in which they were first opened.
What only processes opened that have ended, such as compilers, a start on warm caches does not read. Of a file
that is mapped, the parts count that are in page tables.
"""

import os
import stat
from collections.abc import Collection, Mapping, Sequence

from msgspec import Struct

from rekindle.cell import Cell, page_tables, processes
from rekindle.node.start_reads import FILES_LIMIT, PARTS_LIMIT, TEXT_LIMIT, StartRead, encode
from snapshot.opened import WhatWasRead

Stretches = Sequence[tuple[int, int]]

_JOINED_BYTES = 256 << 10
_SMALL_BYTES = 256 << 10  # of such a file, all is read: one request
_BESIDE = ("/proc/", "/sys/", "/dev/", "/run/", "/var/run/", "/memfd:", "/SYSV", "/anon_hugepage")


class StartReads(Struct, frozen=True, kw_only=True):
    """The files that running processes have opened, in order, and the parts that they have mapped."""

    opened: Sequence[str]
    touched: Mapping[str, Stretches]


def find(cell: Cell, reads: WhatWasRead) -> StartReads:
    """Find what the processes of a cell have opened since their start, and what they have mapped."""
    pids = processes.host_pids(cell)
    touched = page_tables.touched(pids, lambda path: not path.startswith(_BESIDE), joined_bytes=_JOINED_BYTES)
    return StartReads(opened=reads.lasting(pids), touched=touched)


def describe(reads: StartReads, written: Collection[tuple[int, int]], left_out: Sequence[str]) -> str:
    """Describe what a start reads, for the record.

    `written` are the devices and inodes of files that the server has made, `left_out` the beginnings of paths
    that do not count.
    """
    found: list[StartRead] = []
    parts = text = 0
    for path in dict.fromkeys((*reads.opened, *reads.touched)):
        if path.startswith((*_BESIDE, *left_out)) or (status := _status(path)) is None:
            continue
        if (status.st_dev, status.st_ino) in written or not status.st_size:
            continue
        each = StartRead(path, _stretches(reads.touched.get(path), status.st_size))
        parts, text = parts + len(each.parts), text + len(encode([each])) + 1
        if len(found) == FILES_LIMIT or parts > PARTS_LIMIT or text > TEXT_LIMIT:
            break
        found.append(each)
    return encode(found)


def _stretches(touched: Stretches | None, size: int) -> tuple[tuple[int, int], ...]:
    """Return the parts of a file to read; empty for all of a small one."""
    if size <= _SMALL_BYTES:
        return ()
    if not touched:
        return ((0, size),)
    within = ((offset, min(length, size - offset)) for offset, length in touched if offset < size)
    return tuple(within)


def _status(path: str) -> os.stat_result | None:
    """Return the status of a regular file; None if there is none, or if its name cannot be written down."""
    try:
        if not path.isprintable():
            return None
        status = os.stat(path)  # noqa: PTH116 - thousands of times
    except (OSError, ValueError):
        return None
    return status if stat.S_ISREG(status.st_mode) else None
