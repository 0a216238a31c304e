# SPDX-License-Identifier: Apache-2.0
"""Watch which files the processes of a cell open, from the server's start on.

Uses fanotify(7) with a mark on each of the cell's mounts: other processes use mounts of their own, and do not
appear. Each event brings a descriptor of the file, whose link in /proc names it as the cell sees it. The
cell's own init does not count. The file systems that the OS kernel makes up, and devices, are left out: to
report a device, fanotify would open it.
"""

import contextlib
import ctypes
import errno
import os
import select
import stat
import struct
import threading
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from rekindle.cell import Cell

_CLOEXEC, _NONBLOCK, _UNLIMITED_QUEUE = 0x01, 0x02, 0x10  # linux/fanotify.h
_MARK_ADD, _MARK_MOUNT = 0x01, 0x10
_CLOSE_WRITE, _OPEN = 0x08, 0x20
_O_LARGEFILE = 0o100000
_EVENT = struct.Struct("IBBHQii")  # length, version, reserved, length of the head, mask, descriptor, PID
_BUFFER_BYTES = 64 << 10
_FILES_LIMIT = 200_000

_MADE_UP = {
    *("autofs", "binfmt_misc", "bpf", "cgroup", "cgroup2", "configfs", "debugfs", "devpts", "devtmpfs"),
    *("efivarfs", "fusectl", "hugetlbfs", "mqueue", "nsfs", "proc", "pstore", "securityfs", "sysfs"),
    *("rpc_pipefs", "tracefs"),
}

_libc = ctypes.CDLL(None, use_errno=True)


class WhatWasRead(Protocol):
    """The files that a server has opened since its start: see `OpenedFiles`."""

    @property
    def read(self) -> Collection[str]: ...

    def lasting(self, pids: Collection[int]) -> Sequence[str]: ...

    written: set[tuple[int, int]]
    problem: str


class OpenedFiles:
    """Watch a cell within a context. Leaving it ends the watch; the findings stay.

    `read` are the paths of the regular files that were opened, in order, each with the PIDs on the host of
    the processes that did. `written` are the devices and inodes of those that were closed after writing.
    `problem` says why there is no watch, or why it is not complete.
    """

    def __init__(self, cell: Cell) -> None:
        self.read: dict[str, set[int]] = {}
        self.written: set[tuple[int, int]] = set()
        self.problem = ""
        self._cell = cell
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> Self:
        """Begin the watch. Raises nothing: without fanotify, `problem` says so."""
        fd = _libc.fanotify_init(
            _CLOEXEC | _NONBLOCK | _UNLIMITED_QUEUE,
            os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | _O_LARGEFILE,
        )
        if fd < 0:
            self.problem = f"fanotify: {os.strerror(ctypes.get_errno())}"
            return self
        self._undo.callback(os.close, fd)
        marked = [_mark(fd, f"{self._cell.root}{mount}") for mount in _mounts(self._cell)]
        if not any(marked):
            self.problem = "fanotify: no mount of the cell can be watched"
            self._undo.close()
            return self
        ends, ended = os.pipe2(os.O_CLOEXEC)
        self._undo.callback(os.close, ends)
        thread = threading.Thread(target=self._collect, args=[fd, ends], daemon=True)
        thread.start()
        self._undo.callback(thread.join)
        self._undo.callback(os.close, ended)  # the thread ends
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._undo.close()

    def lasting(self, pids: Collection[int]) -> list[str]:
        """Return the files that any of these processes has opened, in the order of their first opening."""
        return [path for path, readers in list(self.read.items()) if not readers.isdisjoint(pids)]

    def _collect(self, fd: int, ends: int) -> None:
        """Take events until the pipe closes, and then those that are left."""
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        poll.register(ends, 0)
        running = True
        while running:
            running = all(number != ends for number, _ in poll.poll())
            while self._take(fd):
                pass

    def _take(self, fd: int) -> bool:
        """Take some events; return False if there are none."""
        try:
            events = os.read(fd, _BUFFER_BYTES)
        except OSError as error:
            # Any other error is that of opening one file for us, and its event is gone.
            return error.errno != errno.EAGAIN
        at = 0
        while at < len(events):
            length, _, _, _, mask, opened, pid = _EVENT.unpack_from(events, at)
            at += length
            if opened >= 0:
                try:
                    if pid != self._cell.init_pid:
                        self._add(opened, mask, pid)
                finally:
                    os.close(opened)
        return bool(events)

    def _add(self, opened: int, mask: int, pid: int) -> None:
        with contextlib.suppress(OSError):
            status = os.fstat(opened)
            if not stat.S_ISREG(status.st_mode):
                return
            if mask & _CLOSE_WRITE:
                self.written.add((status.st_dev, status.st_ino))
            if len(self.read) < _FILES_LIMIT:
                path = os.readlink(f"/proc/self/fd/{opened}")  # noqa: PTH115 - thousands of times
                self.read.setdefault(path, set()).add(pid)
            else:
                self.problem = f"more than {_FILES_LIMIT:,} files were opened"


def _mark(fd: int, path: str) -> bool:
    events = ctypes.c_uint64(_OPEN | _CLOSE_WRITE)
    return not _libc.fanotify_mark(fd, _MARK_ADD | _MARK_MOUNT, events, -1, os.fsencode(path))


def _mounts(cell: Cell) -> Iterator[str]:
    """Yield the mount points of the cell's file systems that hold files."""
    for line in Path(f"/proc/{cell.init_pid}/mountinfo").read_text(errors="surrogateescape").splitlines():
        fields, _, kind = line.partition(" - ")
        place = fields.split(" ")[4]
        for octal, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
            place = place.replace(octal, character)
        if kind.split(" ")[0] not in _MADE_UP and not f"{place}/".startswith("/dev/"):
            yield place
