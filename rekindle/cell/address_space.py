# SPDX-License-Identifier: Apache-2.0
"""Inspect and write a task's memory from another process, through its files in /proc.

The cell's init uses this module under `python -I -S`: it imports only the standard library, and little of it.

Sources: proc_pid_maps(5), proc_pid_pagemap(5), linux/fs.h (PROCMAP_QUERY).
"""

import ctypes
import errno
import fcntl
import io
import os
import struct
from bisect import bisect_right
from collections.abc import Callable, Iterator

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")

_PROCMAP_QUERY = 0xC0686611  # Linux 6.11
# size, flags, address; start, end, flags, page size, offset, inode, device, size of name; rest
_QUERY = struct.Struct("=3Q 6Q 2I I I 2Q")
_IS_SHARED, _THIS_OR_NEXT, _OF_FILE = 8, 0x10, 0x20
_NAME_BYTES = 4096
_STATUS_BYTES = 1 << 14

_ZEROS = memoryview(bytes(1 << 20))
# By the top byte of an entry of pagemap: present (0x80) or swapped (0x40), and not a page of a file (0x20).
_IS_WRITTEN = bytes(bool(byte & 0xC0 and not byte & 0x20) for byte in range(256))
_ANONYMOUS_NAMES = (b"", b"[heap]", b"[stack]")


def pages(size: int) -> int:
    """Return a size rounded up to whole pages."""
    return -(-size // PAGE_BYTES) * PAGE_BYTES


class Area:
    """A line of /proc/PID/maps."""

    __slots__ = ("end", "inode", "is_shared", "name", "offset", "start")

    def __init__(self, start: int, end: int, offset: int, inode: int, is_shared: bool, name: bytes) -> None:
        self.start, self.end, self.offset, self.inode = start, end, offset, inode
        self.is_shared = is_shared
        self.name = name

    @property
    def is_anonymous(self) -> bool:
        is_named = self.name in _ANONYMOUS_NAMES or self.name.startswith(b"[anon:")
        return not self.is_shared and not self.inode and is_named


def _parse(line: bytes) -> Area:
    span, permissions, offset, _, inode, *name = line.rstrip(b"\n").split(None, 5)
    start, end = (int(text, 16) for text in span.split(b"-"))
    is_shared = permissions.endswith(b"s")
    return Area(start, end, int(offset, 16), int(inode), is_shared, name[0] if name else b"")


class AddressSpace:
    """The memory of a task that waits for us, through its files in /proc.

    Each file is opened on first use and refers to the memory that the task has then. `check`, which raises
    GoneError, is called after each opening, since the TID may have been reused.
    """

    # Whether the OS kernel can return a single mapping (PROCMAP_QUERY); assumed until a query fails.
    can_query = True
    _name = ctypes.create_string_buffer(_NAME_BYTES)

    def __init__(self, tid: int, check: Callable[[], None]) -> None:
        self._tid = tid
        self.check = check
        self._fds: dict[str, int] = {}
        self._text: io.BufferedReader | None = None
        self._parsed: list[Area] = []

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)

    def _open(self, name: str) -> int:
        if name not in self._fds:
            flags = os.O_RDWR if name == "mem" else os.O_RDONLY
            self._fds[name] = os.open(f"/proc/{self._tid}/{name}", flags | os.O_CLOEXEC)
            self.check()
        return self._fds[name]

    def find(self, address: int, *, of_file: bool = False) -> Area | None:
        """Return the mapping at an address, or else the next one above; with `of_file`, only of a file."""
        maps = self._open("maps")
        if AddressSpace.can_query:
            flags = _THIS_OR_NEXT | (_OF_FILE if of_file else 0)
            name = ctypes.addressof(self._name)
            query = bytearray(_QUERY.pack(_QUERY.size, flags, address, *[0] * 8, _NAME_BYTES, 0, name, 0))
            try:
                fcntl.ioctl(maps, _PROCMAP_QUERY, query)
            except OSError as error:
                if error.errno == errno.ENOENT:
                    return None
                if error.errno != errno.ENOTTY:
                    raise
                AddressSpace.can_query = False
            else:
                _, _, _, start, end, shown, _, offset, inode, _, _, size, *_ = _QUERY.unpack(query)
                is_shared = bool(shown & _IS_SHARED)
                return Area(start, end, offset, inode, is_shared, self._name.value if size else b"")
        return self._find_in_text(address, of_file)

    def _find_in_text(self, address: int, of_file: bool) -> Area | None:
        """Implement `find` by reading /proc/PID/maps no further than needed."""
        if self._text is None:
            self._text = open(self._open("maps"), "rb", closefd=False)  # noqa: SIM115 - closed with its descriptor
        at = bisect_right(self._parsed, address, key=lambda area: area.end)
        while True:
            if at == len(self._parsed):
                line = self._text.readline()
                if not line:
                    return None
                self._parsed.append(_parse(line))
            area = self._parsed[at]
            if area.end > address and (area.inode or not of_file):
                return area
            at += 1

    def is_still(self, area: Area, start: int, end: int) -> bool:
        """Tell whether a part of an area is still mapped as it was."""
        if self._text is not None:
            self._text.seek(0)
            self._parsed = []
        found = self.find(start)
        return found is not None and found.name == area.name and found.start <= start and end <= found.end

    def between(self, start: int, end: int, *, of_file: bool = False) -> Iterator[Area]:
        """Yield the mappings that overlap a range, in order."""
        while start < end:
            found = self.find(start, of_file=of_file)
            if found is None or found.start >= end:
                return
            yield found
            start = found.end

    def first_forbidden(self, start: int, end: int, *, even_locked: bool) -> int:
        """Return the start of the first mapping in a range whose pages may not be dropped; `end` if none.

        These are mappings of devices and, unless `even_locked`, locked ones. Only smaps shows the flags, and
        reading it takes milliseconds.
        """
        forbidden = {b"pf", b"ht"} if even_locked else {b"pf", b"ht", b"lo"}
        with open(self._open("smaps"), "rb", closefd=False) as file:
            for line in file:
                first, *rest = line.split()
                if not first.endswith(b":"):
                    low, high = (int(text, 16) for text in first.split(b"-"))
                elif first == b"VmFlags:" and start < high and low < end and not forbidden.isdisjoint(rest):
                    return max(low, start)
        return end

    def has_locked(self) -> bool:
        return b"\nVmLck:\t       0 kB" not in os.pread(self._open("status"), _STATUS_BYTES, 0)

    def written(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield the stretches whose pages are the task's own: present or swapped, and not of a file."""
        count = (end - start) // PAGE_BYTES
        entries = os.pread(self._open("pagemap"), 8 * count, start // PAGE_BYTES * 8)
        own = entries[7::8].translate(_IS_WRITTEN)  # little-endian
        at = own.find(1)
        while at >= 0:
            stop = own.find(0, at)
            stop = len(own) if stop < 0 else stop
            yield start + at * PAGE_BYTES, start + stop * PAGE_BYTES
            at = own.find(1, stop)

    def write(self, address: int, content: bytes | memoryview) -> None:
        """Write to the memory, whatever its protection. Raises OSError, or GoneError as `check` does."""
        done = os.pwrite(self._open("mem"), content, address)
        if done < len(content):
            self.check()
            raise OSError(errno.EIO, "write to memory")

    def zero(self, start: int, end: int) -> None:
        for at in range(start, end, len(_ZEROS)):
            self.write(at, _ZEROS[: end - at])

    def read_again(self, mapping: Area, start: int, end: int) -> None:
        """Restore the file's content in the written pages of a private mapping of a file."""
        name = f"map_files/{mapping.start:x}-{mapping.end:x}"
        for low, high in self.written(start, end):
            content = os.pread(self._open(name), high - low, mapping.offset + low - mapping.start)
            if content:  # beyond the file's end there is none
                self.write(low, content + bytes(-len(content) % PAGE_BYTES))
