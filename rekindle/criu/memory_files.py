# SPDX-License-Identifier: Apache-2.0
"""Move private anonymous memory of a dump into files, which a restore maps instead of copying them.

CRIU restores anonymous memory page by page, for every replica. Here the pages of large private anonymous
mappings move into one memory file per process, and the mappings become *private file mappings* of it. CRIU
maps the file at a restore and reads nothing. When a page is touched, the OS kernel takes it from the page
cache, which all replicas share, and copies it when it is written.

    criu/mm-PID.img        vma_entry: MAP_ANONYMOUS is cleared, VMA_ANON_PRIVATE becomes VMA_FILE_PRIVATE,
                           pgoff and shmid (the id of a file) are set
    criu/pagemap-PID.img   without the moved pages; likewise criu/pages-N.img
    criu/files.img         another reg_file_entry for each memory file, at `rekindle.cell.MEMORY_PLACE`
    memory/PID             the pages; zero pages are holes

One file per process, not one for all: CRIU takes mappings of one file at one address in parent and child for
inherited, and does not compare their offsets (CRIU 4.2.1; checkpoint-restore/criu#3037).

CRIU still restores mappings with few pages, stacks and other mappings that grow, locked memory, huge pages,
AIO rings, mappings with guard pages or MADV_WIPEONFORK (which a file mapping cannot have), and run-time code.
File mappings also differ from anonymous memory in MADV_DONTNEED and mremap, which `rekindle.cell`
compensates.
"""

import bisect
import contextlib
import functools
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from msgspec import Struct

from rekindle.cell import MEMORY_PLACE
from rekindle.criu.image_files import (
    FILES_MAGIC,
    MAP_HUGETLB,
    MM_MAGIC,
    PE_PRESENT,
    VMA_ANON_PRIVATE,
    Stretch,
    append_stretch,
    read_messages,
    read_pagemap,
    write_messages,
    write_pagemap,
)
from rekindle.criu.protobuf import Field, encode_fields, integer, read_fields
from rekindle.errors import FormatError
from rekindle.files import PAGE_BYTES, data_extents, write_at

LEAST_PAGES = 64
"""CRIU restores mappings with fewer pages: they are cheaper to fill than to map."""

# vma_entry of CRIU's images/vma.proto, by field number.
_START, _END, _PGOFF, _SHMID, _PROT, _FLAGS, _STATUS, _MADV, _FDFLAGS = 1, 2, 3, 4, 5, 6, 7, 9, 10
_MAPPINGS = 14  # of mm_entry
_VARINT, _BYTES = 0, 2  # wire types

_MAP_ANONYMOUS, _MAP_GROWSDOWN, _MAP_LOCKED = 0x20, 0x100, 0x2000
_PROT_EXEC = 4
_MADV_WIPEONFORK = 1 << 18
_VMA_STACK, _VMA_VSYSCALL, _VMA_VDSO, _VMA_FILE_PRIVATE = 1 << 1, 1 << 2, 1 << 3, 1 << 6
_VMA_VVAR, _VMA_AIORING, _VMA_SHSTK, _VMA_GUARDS = 1 << 12, 1 << 13, 1 << 15, 1 << 16
_SPECIAL = _VMA_STACK | _VMA_VSYSCALL | _VMA_VDSO | _VMA_VVAR | _VMA_AIORING | _VMA_SHSTK | _VMA_GUARDS

_ALIGNMENT_BYTES = 2 << 20  # a huge page: offsets go with addresses, so that large folios can be mapped whole
_COPY_BYTES = 4 << 20
_MODE = 0o100600


class MappedRange(Struct, frozen=True, kw_only=True):
    """A mapping of a memory file from `offset` on, at the addresses [start, end)."""

    start: int
    end: int
    offset: int


class MemoryFile(Struct, frozen=True, kw_only=True):
    """A memory file: its name below `memory/`, the size of its data without holes, and its mappings."""

    name: str
    data_bytes: int
    ranges: Sequence[MappedRange]


def move_memory(criu: Path, memory: Path) -> list[MemoryFile]:
    """Move private anonymous memory of a dump without zero pages into files below `memory`, in place.

    Not atomic: an interruption destroys the dump. Raises FormatError for malformed image files.
    """
    path = criu / "files.img"
    files = list(read_messages(path, FILES_MAGIC))
    next_id = 1 + max((integer(read_fields(each, path), 2, path) for each in files), default=0)
    moved = []
    for pagemap in sorted(criu.glob("pagemap-[0-9]*.img")):
        match = re.fullmatch(r"pagemap-(\d+)\.img", pagemap.name)
        if match is None:
            continue
        task = _Task.read(criu, match[1])
        task.choose()
        if not task.chosen:
            continue
        data_bytes = task.move_pages(memory / task.pid)
        task.map_file(next_id)
        files.append(_file_entry(next_id, f"{MEMORY_PLACE}/{task.pid}", task.file_bytes))
        moved.append(MemoryFile(name=task.pid, data_bytes=data_bytes, ranges=tuple(task.chosen.values())))
        next_id += 1
    write_messages(path, FILES_MAGIC, files)
    return moved


def copy_back(criu: Path, memory: Path, target: Path) -> int:
    """Write a dump without memory files to `target`; return the number of bytes copied.

    It is for nodes on which memory files cannot be mapped. Leaves the dump at `criu` unchanged.
    """
    ids = _memory_file_ids(criu)
    tasks = [task for task in _tasks(criu) if task.uses(ids)]
    changed = {f"{kind}-{task.pid}.img" for task in tasks for kind in ("mm", "pagemap")}
    changed |= {f"pages-{task.pages_id}.img" for task in tasks}
    for path in criu.iterdir():
        if path.name not in changed and path.is_file():
            # Not a hard link: that would change the ctime, by which a ready dump is known to be untouched.
            (target / path.name).write_bytes(path.read_bytes())
    return sum(task.copy_back(memory, ids, target) for task in tasks)


def forget_memory_files(criu: Path) -> None:
    """Remove the memory files from the list of a dump's files, in place; no process may map one."""
    path = criu / "files.img"
    ids = _memory_file_ids(criu)
    messages = read_messages(path, FILES_MAGIC)
    kept = [each for each in messages if integer(read_fields(each, path), 2, path) not in ids]
    write_messages(path, FILES_MAGIC, kept)


def mapped_ranges(criu: Path) -> dict[str, list[MappedRange]]:
    """Return where the processes of a dump map each memory file, by address.

    A server may have moved, unmapped or inherited such memory since it was restored. What several processes
    map is there several times.
    """
    ids = _memory_file_ids(criu)
    found: dict[str, list[MappedRange]] = {name: [] for name in ids.values()}
    for task in _tasks(criu):
        for _, fields, start, end, _, _ in task.entries():
            if name := ids.get(integer(fields, _SHMID, criu)):
                offset = integer(fields, _PGOFF, criu)
                found[name].append(MappedRange(start=start, end=end, offset=offset))
    return {name: sorted(ranges, key=lambda each: each.start) for name, ranges in found.items()}


def are_ambiguous(ranges: Iterable[MappedRange]) -> bool:
    """Tell whether CRIU would confuse mappings of one memory file by several processes.

    It takes mappings of one file at one address for inherited and does not compare their offsets. That takes
    a process that has moved memory after a fork to where its parent has other memory.
    """
    offsets: dict[tuple[int, int], int] = {}
    return any(offsets.setdefault((each.start, each.end), each.offset) != each.offset for each in ranges)


def _tasks(criu: Path) -> Iterator["_Task"]:
    for path in sorted(criu.glob("mm-[0-9]*.img")):
        yield _Task.read(criu, path.stem.removeprefix("mm-"))


class _Task:
    """The memory images of one process."""

    def __init__(self, criu: Path, pid: str, mm: list[Field]) -> None:
        self.criu, self.pid, self.mm = criu, pid, mm
        self.chosen: dict[int, MappedRange] = {}  # by the position of its entry in `mm`
        self.file_bytes = 0

    @classmethod
    def read(cls, criu: Path, pid: str) -> "_Task":
        path = criu / f"mm-{pid}.img"
        message = next(read_messages(path, MM_MAGIC), None)
        if message is None:
            raise FormatError(f"{path.name} is empty")
        return cls(criu, pid, read_fields(message, path))

    @functools.cached_property
    def _pagemap(self) -> tuple[int, list[Stretch]]:
        return read_pagemap(self.criu / f"pagemap-{self.pid}.img")

    @property
    def pages_id(self) -> int:
        return self._pagemap[0]

    @property
    def stretches(self) -> list[Stretch]:
        return self._pagemap[1]

    def choose(self) -> None:
        """Choose the mappings to move, and their offsets in the file."""
        path = self._path
        entries = list(self.entries())
        guards = [(start, end) for _, _, start, end, status, _ in entries if status & _VMA_GUARDS]
        at = 0
        for position, fields, start, end, status, flags in entries:
            if (
                status & VMA_ANON_PRIVATE
                and not status & _SPECIAL
                and not flags & (_MAP_GROWSDOWN | _MAP_LOCKED | MAP_HUGETLB)
                and not integer(fields, _PROT, path) & _PROT_EXEC
                and not integer(fields, _MADV, path, default=0) & _MADV_WIPEONFORK
                and not any(first < end and start < last for first, last in guards)
                and self._present(start, end) >= LEAST_PAGES
            ):
                # Leaves a hole between two mappings, so that the OS kernel does not merge them.
                offset = at + start % _ALIGNMENT_BYTES
                self.chosen[position] = MappedRange(start=start, end=end, offset=offset)
                self.file_bytes = offset + end - start
                at = -(-self.file_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES + _ALIGNMENT_BYTES

    def move_pages(self, target: Path) -> int:
        """Move the pages of the chosen mappings to a file; return the number of bytes moved."""
        left: list[Stretch] = []
        read_from = write_to = moved = 0
        buffer = memoryview(bytearray(_COPY_BYTES))
        with (
            open(self.criu / f"pages-{self.pages_id}.img", "r+b", buffering=0) as pages,
            open(target, "xb", buffering=0) as file,
        ):
            os.fchmod(file.fileno(), _MODE & 0o777)
            file.truncate(self.file_bytes)
            for piece, inside in self._pieces():
                if not piece.flags & PE_PRESENT:
                    left.append(piece)
                    continue
                content = buffer[: piece.pages * PAGE_BYTES]
                if os.preadv(pages.fileno(), [content], read_from) != len(content):
                    raise FormatError(f"pages-{self.pages_id}.img is shorter than its pagemap implies")
                read_from += len(content)
                if inside is not None:
                    moved += write_at(file.fileno(), content, inside.offset + piece.address - inside.start)
                    continue
                if write_to != read_from - len(content):
                    write_at(pages.fileno(), content, write_to)
                write_to += len(content)
                append_stretch(left, piece)
            pages.truncate(write_to)
        write_pagemap(self.criu / f"pagemap-{self.pid}.img", self.pages_id, left)
        return moved

    def map_file(self, file_id: int) -> None:
        """Turn the chosen mappings into private file mappings."""
        for position, chosen in self.chosen.items():
            self._change(
                position,
                pgoff=chosen.offset,
                shmid=file_id,
                set_flags=0,
                clear_flags=_MAP_ANONYMOUS,
                set_status=_VMA_FILE_PRIVATE,
                clear_status=VMA_ANON_PRIVATE,
            )
        write_messages(self.criu / f"mm-{self.pid}.img", MM_MAGIC, [encode_fields(self.mm)])

    def uses(self, ids: Mapping[int, str]) -> bool:
        """Tell whether the process maps one of the files with these ids."""
        return any(integer(fields, _SHMID, self._path) in ids for _, fields, *_ in self.entries())

    def copy_back(self, memory: Path, ids: Mapping[int, str], target: Path) -> int:
        """Write the images of this process to `target` with anonymous memory; return the bytes copied.

        A process maps its own memory file, and after a fork also those of its ancestors.
        """
        path = self._path
        ranges: dict[str, list[MappedRange]] = {}
        for position, fields, start, end, _, _ in list(self.entries()):
            if name := ids.get(integer(fields, _SHMID, path)):
                offset = integer(fields, _PGOFF, path)
                ranges.setdefault(name, []).append(MappedRange(start=start, end=end, offset=offset))
                self._change(
                    position,
                    pgoff=0,
                    shmid=0,
                    set_flags=_MAP_ANONYMOUS,
                    clear_flags=0,
                    set_status=VMA_ANON_PRIVATE,
                    clear_status=_VMA_FILE_PRIVATE,
                )
        write_messages(target / f"mm-{self.pid}.img", MM_MAGIC, [encode_fields(self.mm)])
        with (
            contextlib.ExitStack() as opened,
            open(self.criu / f"pages-{self.pages_id}.img", "rb", buffering=0) as pages,
            open(target / f"pages-{self.pages_id}.img", "xb", buffering=0) as out,
        ):
            sources = [
                (opened.enter_context(open(memory / name, "rb", buffering=0)).fileno(), mapped)
                for name, mapped in ranges.items()
            ]
            stretches: list[Stretch] = []
            copied = 0
            for stretch, fd, at in _merged(self.stretches, pages.fileno(), sources):
                append_stretch(stretches, stretch)
                if stretch.flags & PE_PRESENT:
                    _copy(fd, at, out.fileno(), copied, stretch.pages * PAGE_BYTES)
                    copied += stretch.pages * PAGE_BYTES
        write_pagemap(target / f"pagemap-{self.pid}.img", self.pages_id, stretches)
        return copied

    @property
    def _path(self) -> Path:
        return self.criu / f"mm-{self.pid}.img"

    def entries(self) -> Iterator[tuple[int, list[Field], int, int, int, int]]:
        """Yield each vma_entry as (position, fields, start, end, status, flags)."""
        path = self._path
        for position, (number, _, value) in enumerate(self.mm):
            if number == _MAPPINGS and isinstance(value, bytes):
                fields = read_fields(value, path)
                start, end = integer(fields, _START, path), integer(fields, _END, path)
                if start % PAGE_BYTES or end % PAGE_BYTES or end <= start:
                    raise FormatError(f"{path.name}: invalid mapping {start:#x}-{end:#x}")
                yield (
                    position,
                    fields,
                    start,
                    end,
                    integer(fields, _STATUS, path),
                    integer(fields, _FLAGS, path),
                )

    def _change(
        self,
        position: int,
        *,
        pgoff: int,
        shmid: int,
        set_flags: int,
        clear_flags: int,
        set_status: int,
        clear_status: int,
    ) -> None:
        number, wire, value = self.mm[position]
        assert isinstance(value, bytes)
        path = self._path
        fields = read_fields(value, path)
        wanted = {
            _PGOFF: pgoff,
            _SHMID: shmid,
            _FLAGS: (integer(fields, _FLAGS, path) | set_flags) & ~clear_flags,
            _STATUS: (integer(fields, _STATUS, path) | set_status) & ~clear_status,
            _FDFLAGS: os.O_RDONLY,
        }
        kept = [(n, w, wanted.pop(n) if n in wanted else v) for n, w, v in fields]
        kept += [(n, _VARINT, v) for n, v in sorted(wanted.items())]
        self.mm[position] = (number, wire, encode_fields(kept))

    def _present(self, start: int, end: int) -> int:
        """Count the pages of a range that the pages file holds."""
        first = max(0, bisect.bisect_right(self.stretches, start, key=lambda each: each.address) - 1)
        count = 0
        for each in itertools.islice(self.stretches, first, None):
            if each.address >= end:
                break
            last = min(each.address + each.pages * PAGE_BYTES, end)
            if each.flags & PE_PRESENT and last > start:
                count += (last - max(each.address, start)) // PAGE_BYTES
        return count

    def _pieces(self) -> Iterator[tuple[Stretch, MappedRange | None]]:
        """Split the stretches at the borders of chosen mappings, into pieces no larger than the buffer."""
        ranges = iter(sorted(self.chosen.values(), key=lambda each: each.start))
        current = next(ranges, None)
        for stretch in self.stretches:
            address, end = stretch.address, stretch.address + stretch.pages * PAGE_BYTES
            while address < end:
                while current and current.end <= address:
                    current = next(ranges, None)
                inside = current if current and current.start <= address else None
                border = end if current is None else current.end if inside else current.start
                until = min(end, border, address + _COPY_BYTES)
                pages = (until - address) // PAGE_BYTES
                yield Stretch(address=address, pages=pages, flags=stretch.flags), inside
                address = until


def _merged(
    stretches: Sequence[Stretch], pages_fd: int, sources: Sequence[tuple[int, Sequence[MappedRange]]]
) -> list[tuple[Stretch, int, int]]:
    """Return the stretches of a restored process by address, each with the file and offset of its pages.

    `sources` are memory files and their mappings. Pages that CRIU has of such a mapping were written later
    and override the file's.
    """
    found: list[tuple[Stretch, int, int]] = []
    at = 0
    for stretch in stretches:
        found.append((stretch, pages_fd, at))
        at += stretch.pages * PAGE_BYTES if stretch.flags & PE_PRESENT else 0
    written = sorted((s.address, s.address + s.pages * PAGE_BYTES) for s in stretches)
    for fd, ranges in sources:
        for extent, length in data_extents(fd, os.fstat(fd).st_size):
            for each in ranges:
                first = max(each.offset, extent)
                last = min(each.offset + each.end - each.start, extent + length)
                if first >= last:
                    continue
                address = each.start + first - each.offset
                for start, end in _without(address, address + last - first, written):
                    stretch = Stretch(address=start, pages=(end - start) // PAGE_BYTES, flags=PE_PRESENT)
                    found.append((stretch, fd, each.offset + start - each.start))
    return sorted(found, key=lambda each: each[0].address)


def _without(start: int, end: int, taken: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield the parts of a range that are not in `taken`, which is sorted and without overlaps."""
    begin = bisect.bisect_right(taken, start, key=lambda each: each[1])
    for first, last in itertools.islice(taken, begin, None):
        if first >= end:
            break
        if first > start:
            yield start, first
        start = last
    if start < end:
        yield start, end


def _copy(source: int, source_at: int, target: int, target_at: int, length: int) -> None:
    while length:
        count = os.copy_file_range(source, target, length, source_at, target_at)
        if count == 0:
            raise FormatError("a pages file is shorter than its pagemap implies")
        source_at, target_at, length = source_at + count, target_at + count, length - count


def _memory_file_ids(criu: Path) -> dict[int, str]:
    """Return the names of the memory files that a dump maps, by CRIU's ids."""
    return {
        integer(fields, 2, criu / "files.img"): Path(name).name
        for fields, name in _regular_files(criu / "files.img")
        if name.startswith(f"{MEMORY_PLACE}/")
    }


def _regular_files(path: Path) -> Iterator[tuple[list[Field], str]]:
    """Yield the entries of regular files in files.img with their names."""
    for message in read_messages(path, FILES_MAGIC):
        fields = read_fields(message, path)
        for number, _, value in fields:
            if number == 3 and isinstance(value, bytes):
                name = next((v for n, _, v in read_fields(value, path) if n == 6), b"")
                if isinstance(name, bytes):
                    yield fields, name.decode(errors="surrogateescape")


def _file_entry(file_id: int, path: str, size: int) -> bytes:
    """Return a file_entry of CRIU's images/fdinfo.proto for a regular file (images/regfile.proto)."""
    owner = encode_fields([(number, _VARINT, 0) for number in (1, 2, 3, 4, 5)])
    regular: list[Field] = [
        (1, _VARINT, file_id),
        (2, _VARINT, os.O_RDONLY),
        (3, _VARINT, 0),
        (5, _BYTES, owner),
        (6, _BYTES, path.encode()),
        (8, _VARINT, size),
        (10, _VARINT, _MODE),
    ]
    return encode_fields([(1, _VARINT, 1), (2, _VARINT, file_id), (3, _BYTES, encode_fields(regular))])
