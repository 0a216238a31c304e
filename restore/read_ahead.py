# SPDX-License-Identifier: Apache-2.0
"""Read ahead what a start of a server will read, in the order of its first need.

A server that starts reads its libraries, modules and weights bit by bit, and waits each time. Threads read
the same in large pieces into the page cache while it starts. A few pieces are under way at any time, so that
the server's own reads, which come in between, need not wait long.
"""

import contextlib
import ctypes
import os
import stat
import threading
import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Self

from rekindle.node.memory import available_bytes
from rekindle.node.start_reads import StartRead
from rekindle.report import ReadAheadUse

_PIECE_BYTES = 2 << 20  # what Linux reads at most for one POSIX_FADV_WILLNEED
_THREADS = 4
_OF_AVAILABLE = 0.5  # the rest is for the server itself
_NICE = 10
_IOPRIO_SET = 251  # of x86-64
_IOPRIO_WHO_PROCESS, _LOWEST_OF_BEST_EFFORT = 1, 2 << 13 | 7  # linux/ioprio.h

Piece = tuple[str, int, int | None]
"""The path, and the offset and length in bytes of a part; None for all of a small file."""


class ReadAhead:
    """A context in which threads read files into the page cache, once `begin` is called.

    What is there already costs next to nothing. What cannot be read is skipped. At most half of the available
    memory is filled, since what is read later would drive out what was read first.
    """

    def __init__(self) -> None:
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._pieces: Iterator[Piece] = iter(())
        self._left_bytes = 0
        self._began = self._ended = 0.0
        self._files: set[str] = set()
        self._bytes = 0
        self._is_full = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def begin(self, reads: Sequence[StartRead], limit_bytes: int | None = None) -> None:
        """Begin to read, unless that has begun. `limit_bytes` is by default half of what is available."""
        if self._threads or self._over.is_set() or not reads:
            return
        if limit_bytes is None:
            limit_bytes = int((available_bytes() or 0) * _OF_AVAILABLE)
        self._left_bytes = limit_bytes
        self._pieces = _pieces(reads)
        self._began = time.monotonic()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(_THREADS)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Read no further. Idempotent. Does not wait for what is under way."""
        self._over.set()

    def wait(self) -> None:
        """Wait until everything is read."""
        for thread in self._threads:
            thread.join()

    @property
    def use(self) -> ReadAheadUse | None:
        """Return what was read so far; None if nothing was to be read."""
        if not self._threads:
            return None
        with self._lock:
            ended = self._ended if not any(each.is_alive() for each in self._threads) else time.monotonic()
            return ReadAheadUse(
                files=len(self._files),
                bytes=self._bytes,
                seconds=ended - self._began,
                complete=not self._is_full and not self._over.is_set(),
            )

    def _run(self) -> None:
        _lower_priority()
        while piece := self._next():
            with contextlib.suppress(OSError, ValueError):
                self._read(*piece)
        with self._lock:
            self._ended = time.monotonic()

    def _next(self) -> Piece | None:
        with self._lock:
            if self._over.is_set() or self._is_full:
                return None
            return next(self._pieces, None)

    def _read(self, path: str, offset: int, length: int | None) -> None:
        length = _size_bytes(path) if length is None else length
        if not length or not self._count(path, length):
            return
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            for at in range(offset, offset + length, _PIECE_BYTES):
                size = min(_PIECE_BYTES, offset + length - at)
                os.posix_fadvise(fd, at, size, os.POSIX_FADV_WILLNEED)
                os.pread(fd, 1, at + size - 1)  # waits until it is there, and copies nothing
                if self._over.is_set():
                    return
        finally:
            os.close(fd)

    def _count(self, path: str, length: int) -> bool:
        """Count what will be read; return False if there is no memory for it."""
        with self._lock:
            if length > self._left_bytes:
                self._is_full = True
                return False
            self._left_bytes -= length
            self._bytes += length
            self._files.add(path)
            return True


def _pieces(reads: Sequence[StartRead]) -> Iterator[Piece]:
    for path, parts in reads:
        if not parts:
            yield path, 0, None
            continue
        size = _size_bytes(path)
        for offset, length in parts:
            end = min(offset + length, size)
            for at in range(offset, end, _PIECE_BYTES):
                yield path, at, min(_PIECE_BYTES, end - at)


def _size_bytes(path: str) -> int:
    """Return the size of a regular file, 0 for all else: to open a device or a pipe would do something."""
    try:
        status = os.stat(path)  # noqa: PTH116 - thousands of times
    except OSError:
        return 0
    return status.st_size if stat.S_ISREG(status.st_mode) else 0


def _lower_priority() -> None:
    """Let the server go first, where processor and disk have priorities. Affects this thread alone."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
    if os.uname().machine == "x86_64":
        ctypes.CDLL(None).syscall(_IOPRIO_SET, _IOPRIO_WHO_PROCESS, 0, _LOWEST_OF_BEST_EFFORT)
