# SPDX-License-Identifier: Apache-2.0
"""Restore a process's memory: mapped from the dump's memory files, or copied."""

import heapq
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from rekindle.cell import MappingRefused, MemoryFiles
from rekindle.record import Record
from rekindle.report import MemoryMode, MemoryUse
from restore import dumps
from restore.options import Memory


class RestoreCall(Protocol):
    """`rekindle.criu.restore`, with all arguments but the dump and its memory files."""

    def __call__(self, directory: Path, *, memory: MemoryFiles | None = None) -> None: ...


def restore_with_memory(
    restore: RestoreCall, record: Record, dump: Path, work: Path, asked: Memory, mount: int | None = None
) -> MemoryUse:
    """Restore a dump with its memory files mapped, or copied if `asked` says so or mapping is refused.

    `mount` is a descriptor of a mount that shows the memory files instead of the dump.

    Copying takes seconds for gigabytes the first time: the pages are written again, as CRIU reads them.
    """
    if not record.dump.memory:  # an image of format 1: CRIU copies all of its memory
        restore(dump / "criu")
        return MemoryUse(mode=MemoryMode.COPIED)
    reason = ""
    if asked is Memory.MAP:
        try:
            memory = MemoryFiles(directory=dump / "memory", ranges=joined_ranges(record), mount=mount)
            restore(dump / "criu", memory=memory)
        except MappingRefused as refused:
            reason = str(refused)
        else:
            return MemoryUse(mode=MemoryMode.MAPPED)
    with dumps.copied(dump, work) as copied:
        restore(copied)
    return MemoryUse(mode=MemoryMode.COPIED, reason=reason)


def joined_ranges(record: Record) -> list[tuple[int, int]]:
    """Return the addresses at which any process maps its memory file, in order and without overlaps."""
    return join_ranges(heapq.merge(*(each.ranges for each in record.dump.memory)))


def join_ranges(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return sorted ranges without overlaps; those that touch become one."""
    joined: list[tuple[int, int]] = []
    for start, end in ranges:
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((start, end))
    return joined
