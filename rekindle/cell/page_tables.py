# SPDX-License-Identifier: Apache-2.0
"""Find the parts of files that the processes of a cell have touched, from their page tables.

A page counts if a page table refers to it, including neighbors that the OS kernel maps along with it.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from rekindle.files import PAGE_BYTES

Stretch = tuple[int, int]
"""An offset and a length, in bytes."""

_ENTRY_BYTES = 8  # of /proc/PID/pagemap: Documentation/admin-guide/mm/pagemap.rst
_READ_ENTRIES = 1 << 17
# The top byte of an entry has the bit that says that the page is present.
_IS_PRESENT = bytes(each >> 7 for each in range(256))


def touched(
    pids: Sequence[int], counts: Callable[[str], bool], *, joined_bytes: int
) -> dict[str, list[Stretch]]:
    """Return the touched stretches of each mapped file whose path `counts`, as the processes see it.

    Stretches that are closer than `joined_bytes` are joined: another request to a disk costs as much as
    reading the gap. `pids` are those on the host.
    """
    found: dict[str, list[Stretch]] = {}
    for pid in pids:
        with contextlib.suppress(OSError):  # the process has ended
            for start, end, offset, path in _mappings(pid):
                if counts(path):
                    found.setdefault(path, []).extend(_present(pid, start, end, offset))
    return {path: joined(stretches, joined_bytes) for path, stretches in found.items()}


def _mappings(pid: int) -> Iterator[tuple[int, int, int, str]]:
    """Yield start, end, offset and path of each mapping of a file."""
    for line in Path(f"/proc/{pid}/maps").read_text(errors="surrogateescape").splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5].startswith("/"):
            start, end = (int(each, 16) for each in fields[0].split("-"))
            yield start, end, int(fields[2], 16), fields[5]


def _present(pid: int, start: int, end: int, offset: int) -> Iterator[Stretch]:
    with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as file:
        for first in range(start, end, _READ_ENTRIES * PAGE_BYTES):
            last = min(end, first + _READ_ENTRIES * PAGE_BYTES)
            file.seek(first // PAGE_BYTES * _ENTRY_BYTES)
            entries = file.read((last - first) // PAGE_BYTES * _ENTRY_BYTES)
            present = entries[_ENTRY_BYTES - 1 :: _ENTRY_BYTES].translate(_IS_PRESENT)
            at = present.find(1)
            while at >= 0:
                ends = present.find(0, at)
                ends = len(present) if ends < 0 else ends
                yield offset + first - start + at * PAGE_BYTES, (ends - at) * PAGE_BYTES
                at = present.find(1, ends)


def joined(stretches: Iterable[Stretch], gap: int) -> list[Stretch]:
    """Return stretches in order; those with at most `gap` bytes between them become one."""
    found: list[Stretch] = []
    for offset, length in sorted(stretches):
        if found and offset <= sum(found[-1]) + gap:
            begin, known = found[-1]
            found[-1] = (begin, max(known, offset + length - begin))
        else:
            found.append((offset, length))
    return found
