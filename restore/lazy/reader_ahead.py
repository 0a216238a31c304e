# SPDX-License-Identifier: Apache-2.0
"""Bring what has arrived into the page cache of the file system that servers map, before they touch it.

A process of its own: whoever has /dev/fuse open must never wait for the file system (docs/adr/0037).
"""

import contextlib
import ctypes
import os
import signal
import struct
from collections.abc import Sequence
from pathlib import Path

_MESSAGE = struct.Struct("=IxxxxQQ")
_PIECE_BYTES = 128 << 10  # what the OS kernel reads at most for one POSIX_FADV_WILLNEED
_MESSAGES = 100
_PR_SET_PDEATHSIG = 1


class ReaderAhead:
    """The process. `arrived` tells it what can be read; it must not block for long."""

    def __init__(self, place: Path, names: Sequence[str], closed: Sequence[int]) -> None:
        """Start it, from a process with one thread. `closed` are descriptors that it must not have.

        It opens the files of the directory `place` when the first part of each has arrived.
        """
        reader, self._writer = os.pipe2(os.O_CLOEXEC)
        parent = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                for fd in (*closed, self._writer):
                    os.close(fd)
                ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
                if os.getppid() == parent:
                    _read_ahead(reader, place, names)
            finally:
                os._exit(0)
        os.close(reader)

    def arrived(self, number: int, offset: int, length: int) -> None:
        """Tell it that a part of the file with this position among the names can be read."""
        with contextlib.suppress(OSError):
            os.write(self._writer, _MESSAGE.pack(number, offset, length))


def _read_ahead(reader: int, place: Path, names: Sequence[str]) -> None:
    opened: dict[int, int] = {}
    left = b""
    while content := os.read(reader, _MESSAGES * _MESSAGE.size):
        content = left + content
        whole = len(content) // _MESSAGE.size * _MESSAGE.size
        left = content[whole:]
        for number, offset, length in _MESSAGE.iter_unpack(content[:whole]):
            if number not in opened:
                opened[number] = os.open(place / names[number], os.O_RDONLY | os.O_CLOEXEC)
            for at in range(offset, offset + length, _PIECE_BYTES):
                size = min(_PIECE_BYTES, offset + length - at)
                os.posix_fadvise(opened[number], at, size, os.POSIX_FADV_WILLNEED)
