# SPDX-License-Identifier: Apache-2.0
"""Find the epolls, inotifies and pressure triggers that CRIU cannot dump.

The rules follow CRIU 4.2.1: `criu/eventpoll.c`, `criu/fsnotify.c`; /proc/PID/fdinfo is in proc_pid_fdinfo(5).
"""

import contextlib
import os
import re
from collections.abc import Collection
from pathlib import Path

from rekindle.cell import Cell, processes
from rekindle.criu.faults import WATCH_ON_OVERLAYFS, Fault
from snapshot.socket_obstacles import Finding

_PRESSURE = ("/cpu.pressure", "/io.pressure", "/memory.pressure", "/irq.pressure")
_WATCHED_BY_EPOLL = re.compile(r"^tfd:\s*(?P<number>\d+) .*\bino:(?P<inode>[0-9a-f]+) ")


def of_watcher(cell: Cell, pid: int, fd: int, target: str, faults: Collection[Fault]) -> Finding | None:
    """Return a finding for an open epoll, inotify or trigger; None for a descriptor of another kind.

    `faults` are those of the CRIU that will dump it.
    """
    if target == "anon_inode:[eventpoll]":
        return _of_epoll(cell, pid, fd)
    if target == "anon_inode:inotify" and WATCH_ON_OVERLAYFS in faults:
        return _of_inotify(cell, pid, fd)
    if target.startswith("/proc/pressure/") or target.endswith(_PRESSURE):
        return _of_pressure(cell, pid, fd)
    return None


def _of_epoll(cell: Cell, pid: int, fd: int) -> Finding | None:
    """Return a finding for an epoll that watches a file under a number which is not that file any more.

    A child that has inherited the epoll is not asked: CRIU dumps it with its parent.
    """
    process = processes.proc(cell) / str(pid)
    parent = processes.status(cell, pid).get("PPid", "")
    with contextlib.suppress(OSError):
        if (process.parent / parent / "fd" / str(fd)).readlink() == (process / "fd" / str(fd)).readlink():
            return None
    with contextlib.suppress(OSError, ValueError):
        open_now = _inodes(cell, pid)
        for line in (process / "fdinfo" / str(fd)).read_text().splitlines():
            # "tfd: 5 events: 1 data: 0 pos:0 ino:61af sdev:7"
            match = _WATCHED_BY_EPOLL.search(line)
            if match and int(match["inode"], 16) not in open_now:
                closed = f"watches a file that this process has closed (it was descriptor {match['number']})"
                return closed, "remove a file from the epoll before you close it"
    return None


def _of_pressure(cell: Cell, pid: int, fd: int) -> Finding | None:
    """Return a finding for a file of psi(7) that is open for writing, which is how a trigger is made."""
    with contextlib.suppress(OSError, ValueError):
        fields = (processes.proc(cell) / str(pid) / "fdinfo" / str(fd)).read_text().split()
        if int(fields[fields.index("flags:") + 1], 8) & os.O_ACCMODE != os.O_RDONLY:
            return "waits for pressure (psi), which a restored process would not be told", "turn that off"
    return None


def _inodes(cell: Cell, pid: int) -> set[int]:
    """Return the inodes of a process's open files."""
    found = set()
    for entry in os.scandir(processes.proc(cell) / str(pid) / "fd"):
        with contextlib.suppress(OSError):
            found.add(Path(entry.path).stat().st_ino)
    return found


def _of_inotify(cell: Cell, pid: int, fd: int) -> Finding | None:
    """Return a finding for a watch on overlayfs, whose files CRIU 4.2.1 cannot find by their handles."""
    process = processes.proc(cell) / str(pid)
    with contextlib.suppress(OSError, ValueError):
        overlays = {
            fields[2]
            for fields in map(str.split, (process / "mountinfo").read_text().splitlines())
            if fields[fields.index("-") + 1] == "overlay"
        }
        for line in (process / "fdinfo" / str(fd)).read_text().splitlines():
            # "inotify wd:1 ino:9e7e sdev:800013 mask:…"; sdev is the OS kernel's own encoding
            if match := re.search(r"\bsdev:([0-9a-f]+)\b", line):
                device = int(match[1], 16)
                if f"{device >> 20}:{device & 0xFFFFF}" in overlays:
                    return (
                        "watches a file on overlayfs, the root of most containers",
                        "turn the watch (often --reload) off, mount a volume there, or use CRIU "
                        f"{WATCH_ON_OVERLAYFS.right} (hack/get-criu --newer)",
                    )
    return None
