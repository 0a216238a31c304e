# SPDX-License-Identifier: Apache-2.0
"""Restore a process's memory: mapped from the dump's memory files, or copied."""

import heapq
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple, Protocol

from rekindle.cell import MappingRefused, MemoryFiles
from rekindle.record import Record
from rekindle.report import MemoryMode, MemoryUse
from restore.copied_dumps import copied
from restore.options import Memory


class Shown(NamedTuple):
    """A mount that shows the memory files of a dump. `whole` waits until the dump itself has all of them."""

    mount: int
    whole: Callable[[Path], Path]


class RestoreCall(Protocol):
    """`rekindle.criu.restore`, with all arguments but the dump and its memory files."""

    def __call__(self, directory: Path, *, memory: MemoryFiles | None = None) -> None: ...


def restore_with_memory(
    restore: RestoreCall, record: Record, dump: Path, work: Path, asked: Memory, shown: Shown | None = None
) -> MemoryUse:
    """Restore a dump with its memory files mapped, or copied if `asked` says so or mapping is refused.

    `shown` are the memory files if they are not mapped from the dump itself.

    Copying takes seconds for gigabytes the first time: the pages are written again, as CRIU reads them.
    """
    if not record.dump.memory:  # an image of format 1: CRIU copies all of its memory
        restore(dump / "criu")
        return MemoryUse(mode=MemoryMode.COPIED)
    reason = ""
    if asked is Memory.MAP:
        try:
            mount = shown.mount if shown else None
            memory = MemoryFiles(directory=dump / "memory", ranges=joined_ranges(record), mount=mount)
            restore(dump / "criu", memory=memory)
        except MappingRefused as refused:
            reason = str(refused)
        else:
            return MemoryUse(mode=MemoryMode.MAPPED)
    with copied(shown.whole(dump) if shown else dump, work) as images:
        restore(images)
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
