# SPDX-License-Identifier: Apache-2.0
"""Find the parts of their memory files that the processes of a cell have touched, from their page tables."""

import contextlib
from array import array
from collections.abc import Iterator
from pathlib import Path

from rekindle.cell import MEMORY_PLACE, Cell, processes
from rekindle.files import PAGE_BYTES

_JOINED_BYTES = 64 << 10
"""Closer stretches are joined: another request to a disk costs as much as reading the gap."""

_ENTRY_BYTES = 8  # of /proc/PID/pagemap: Documentation/admin-guide/mm/pagemap.rst
_PRESENT = 1 << 63
_READ_ENTRIES = 1 << 16


def touched(cell: Cell) -> dict[str, list[tuple[int, int]]]:
    """Return the touched stretches of each memory file, as {name: [(offset, length in bytes), …]}.

    A page counts if a page table refers to it, including neighbors that the OS kernel maps along with it.
    """
    found: dict[str, list[tuple[int, int]]] = {}
    for pid in processes.host_pids(cell):
        with contextlib.suppress(OSError):  # the process has ended
            for start, end, offset, name in _mappings(pid):
                found.setdefault(name, []).extend(_present(pid, start, end, offset))
    return {name: _joined(stretches) for name, stretches in found.items()}


def _mappings(pid: int) -> Iterator[tuple[int, int, int, str]]:
    """Yield start, end and offset of each mapping of a memory file, and the file's name."""
    for line in Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5].startswith(f"{MEMORY_PLACE}/"):
            start, end = (int(each, 16) for each in fields[0].split("-"))
            yield start, end, int(fields[2], 16), Path(fields[5]).name


def _present(pid: int, start: int, end: int, offset: int) -> Iterator[tuple[int, int]]:
    with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as file:
        for first in range(start, end, _READ_ENTRIES * PAGE_BYTES):
            last = min(end, first + _READ_ENTRIES * PAGE_BYTES)
            file.seek(first // PAGE_BYTES * _ENTRY_BYTES)
            entries = array("Q")
            entries.frombytes(file.read((last - first) // PAGE_BYTES * _ENTRY_BYTES))
            for index, entry in enumerate(entries):
                if entry & _PRESENT:
                    yield offset + first - start + index * PAGE_BYTES, PAGE_BYTES


def _joined(stretches: list[tuple[int, int]]) -> list[tuple[int, int]]:
    joined: list[tuple[int, int]] = []
    for offset, length in sorted(stretches):
        if joined and offset <= sum(joined[-1]) + _JOINED_BYTES:
            begin, known = joined[-1]
            joined[-1] = (begin, max(known, offset + length - begin))
        else:
            joined.append((offset, length))
    return joined
