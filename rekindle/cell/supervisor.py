# SPDX-License-Identifier: Apache-2.0
"""Answer system calls on mapped memory files as if the memory were anonymous.

The cell's init uses this module under `python -I -S`: it imports only the standard library, and little of it.

Sources: mm/madvise.c and mm/mremap.c of Linux, for the effects and the order of errors.
"""

import contextlib
import errno
import os
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Sequence

from rekindle.cell.address_space import PAGE_BYTES, AddressSpace, Area, pages
from rekindle.cell.memory import (
    MADV_DONTNEED,
    MADV_DONTNEED_LOCKED,
    MADV_GUARD_INSTALL,
    MREMAP_DONTUNMAP,
    MREMAP_FIXED,
    MREMAP_MAYMOVE,
    Call,
    CallSource,
    GoneError,
)

# A job does this much (some 1 ms) before it is another job's turn.
_PIECE_BYTES = 2 << 20
_PIECE_MAPPINGS = 100
_CALLS_PER_PIECE = 64
# A job has up to four descriptors open, so further calls wait.
_JOBS_LIMIT = 16


class Supervisor:
    """Answers the calls of every task under one filter.

    `ranges` are all addresses at which a process has a memory file mapped, sorted and disjoint. Calls about
    other addresses continue at once, unless a program has moved such memory. Every other call becomes a job,
    done in pieces so that a large one does not delay others: call `receive` whenever `listener` is readable,
    and `step` while `busy` is true.

    An area maps a memory file if its path is in the files' directory. (Device and inode do not tell: on btrfs
    and overlayfs, stat and /proc/PID/maps report different numbers.)
    """

    def __init__(self, listener: CallSource, directory: str, ranges: Sequence[Sequence[int]]) -> None:
        """Create a supervisor; `directory` is the path of the memory files as seen by the tasks."""
        self.listener = listener
        self._prefix = os.fsencode(directory) + b"/"
        self._starts = [start for start, _ in ranges]
        self._ends = [end for _, end in ranges]
        self._has_moved = False
        self._files: dict[bytes, int] = {}
        self._running: deque[Iterator[None]] = deque()
        self._waiting: deque[Iterator[None]] = deque()

    @property
    def busy(self) -> bool:
        return bool(self._running or self._waiting)

    def receive(self) -> None:
        """Receive a call, and let it continue if it is not about memory files.

        While there are jobs, receive all waiting calls: a signal can interrupt a call until then (EINTR).
        """
        for _ in range(_CALLS_PER_PIECE):
            call = self.listener.receive()
            if call is not None:
                self._take_in(call)
            if not self.busy or not self.listener.is_readable():
                return

    def _take_in(self, call: Call) -> None:
        start, end = _range(call)
        at = bisect_right(self._ends, start)  # the first range that ends behind it
        if self._has_moved or (at < len(self._ends) and self._starts[at] < end):
            self._waiting.append(self._job(call, start, end))
        else:
            call.resume()

    def step(self) -> None:
        """Do a piece of the next job."""
        while self._waiting and len(self._running) < _JOBS_LIMIT:
            self._running.append(self._waiting.popleft())
        if self._running:
            job = self._running.popleft()
            with contextlib.suppress(StopIteration):
                next(job)
                self._running.append(job)

    def _job(self, call: Call, start: int, end: int) -> Iterator[None]:
        memory = AddressSpace(call.tid, call.check)
        try:
            yield from (self._remap if call.is_mremap else self._advise)(call, memory, start, end)
        except GoneError:
            pass
        except OSError:  # from /proc or a file: the only honest answer is an error
            call.answer(errno.EIO)
        finally:
            memory.close()

    def _remap(self, call: Call, memory: AddressSpace, start: int, end: int) -> Iterator[None]:
        """Refuse growth with ENOMEM; realloc then allocates, copies and frees."""
        _, old_size, new_size, flags, new_start, _ = call.arguments
        if not any(self._has(area) for area in memory.between(start, end, of_file=True)):
            call.resume()
        elif flags & MREMAP_DONTUNMAP or not old_size:
            # The old range stays mapped and would have to become zeros. Linux before 5.7 has no DONTUNMAP.
            call.answer(errno.EINVAL)
        elif pages(new_size) > pages(old_size):
            if flags & MREMAP_FIXED and not _is_valid_move(*call.arguments[:5]):
                call.answer(errno.EINVAL)
            else:
                area = memory.find(start)
                is_whole = area is not None and area.start <= start and end <= area.end
                call.answer(errno.ENOMEM if is_whole else errno.EFAULT)
        else:
            if flags & MREMAP_FIXED:
                at = bisect_right(self._ends, new_start)
                is_known = at < len(self._ends) and self._starts[at] <= new_start
                # The filter does not stop a second move, from outside the known ranges.
                self._has_moved |= not (is_known and new_start + pages(new_size) <= self._ends[at])
            call.resume()
        yield

    def _advise(self, call: Call, memory: AddressSpace, start: int, end: int) -> Iterator[None]:
        """Do what madvise does to anonymous memory, with the same order of mappings and errors."""
        advice = call.arguments[2] & 0xFFFFFFFF
        is_zeroing = advice in (MADV_DONTNEED, MADV_DONTNEED_LOCKED)
        is_concerned = has_others = False
        for count, area in enumerate(memory.between(start, end), 1):
            if self._has(area):
                # Over a hole of the file, the OS kernel itself restores zeros, and frees the pages.
                is_concerned |= not is_zeroing or self._has_data(area, start, end)
            else:
                has_others |= not area.is_anonymous
            if count % _PIECE_MAPPINGS == 0:
                yield
        if not is_concerned:
            call.resume()
            return
        if advice == MADV_GUARD_INSTALL:
            # As on Linux before 6.13. After the guard's removal, the file's bytes would be back.
            call.answer(errno.EINVAL)
            return
        limit = end
        if has_others or memory.has_locked():
            limit = memory.first_forbidden(start, end, even_locked=advice == MADV_DONTNEED_LOCKED)
        has_gap = False
        while (found := memory.find(start)) and found.start < end:
            has_gap |= start < found.start
            start = max(start, found.start)
            if start >= limit or not (is_zeroing or self._has(found) or found.is_anonymous):
                call.answer(errno.EINVAL)
                return
            stop = min(found.end, end, limit)
            if is_zeroing:  # MADV_FREE may keep the pages
                stop = min(stop, start + _PIECE_BYTES)
                try:
                    self._drop(memory, found, start, stop)
                except OSError:
                    if memory.is_still(found, start, stop):
                        raise
                    continue  # another thread has unmapped it
            start = stop
            if start >= end:
                break
            yield
            memory.check()
        call.answer(errno.ENOMEM if has_gap or start < end else 0)

    def _drop(self, memory: AddressSpace, area: Area, start: int, end: int) -> None:
        """Reset pages of an area to their content before the first write."""
        if self._has(area):
            for low, high, has_data in self._extents(area, start, end):
                for at, stop in [(low, high)] if has_data else memory.written(low, high):
                    memory.zero(at, stop)
        elif area.is_anonymous:
            for at, stop in memory.written(start, end):
                memory.zero(at, stop)
        elif area.inode and not area.is_shared:
            memory.read_again(area, start, end)

    def _has(self, area: Area) -> bool:
        """Tell whether an area is a private mapping of a memory file; shared ones are not process memory."""
        return area.name.startswith(self._prefix) and not area.is_shared

    def _has_data(self, area: Area, start: int, end: int) -> bool:
        start, end = max(start, area.start), min(end, area.end)
        return any(has_data for _, _, has_data in self._extents(area, start, end))

    def _extents(self, area: Area, start: int, end: int) -> Iterator[tuple[int, int, bool]]:
        """Yield the parts of a range of an area, each with whether its memory file has data there."""
        if area.name not in self._files:
            self._files[area.name] = os.open(area.name, os.O_RDONLY | os.O_CLOEXEC)
        file = self._files[area.name]
        to_file = area.offset - area.start
        while start < end:
            try:
                data = os.lseek(file, start + to_file, os.SEEK_DATA) - to_file
                hole = os.lseek(file, data + to_file, os.SEEK_HOLE) - to_file
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                data = hole = end  # no data up to the file's end
            data, hole = min(data // PAGE_BYTES * PAGE_BYTES, end), min(pages(hole), end)
            if start < data:
                yield start, data, False
            if data < hole:
                yield max(start, data), hole, True
            start = hole


def _is_valid_move(start: int, old_size: int, new_size: int, flags: int, new_start: int) -> bool:
    """Tell whether mremap accepts the arguments of a move to a given place."""
    is_apart = start + pages(old_size) <= new_start or new_start + pages(new_size) <= start
    return bool(flags & MREMAP_MAYMOVE) and new_start % PAGE_BYTES == 0 and is_apart


def _range(call: Call) -> tuple[int, int]:
    """Return the start and end of the memory that a call is about; (0, 0) if the call can only fail."""
    start, size = call.arguments[:2]
    end = start + pages(size or call.is_mremap)
    return (start, end) if start % PAGE_BYTES == 0 and end < 1 << 64 else (0, 0)
