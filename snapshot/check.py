# SPDX-License-Identifier: Apache-2.0
"""What a server holds that CRIU cannot dump: found before the dump, and named with its remedy.

The rules follow CRIU 4.2.1: `criu/files.c` (which descriptors it knows), `criu/sockets.c` (which
families), `criu/proc_parse.c` (which mappings).
"""

import contextlib
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rekindle import processes
from rekindle.cell import Cell, Network
from rekindle.errors import NotDumpableError


@dataclass(frozen=True, slots=True, kw_only=True)
class Obstacle:
    """Something that cannot be dumped. `where` is a descriptor, a mapping or the process itself."""

    pid: int
    command: str
    where: str
    what: str
    remedy: str

    def __str__(self) -> str:
        return f"process {self.pid} ({self.command}), {self.where}: {self.what}; {self.remedy}"


# Anonymous inodes that CRIU dumps; every other one is an obstacle.
_KNOWN_ANONYMOUS = re.compile(
    r"anon_inode:(?:\[(?:eventfd|eventpoll|timerfd|signalfd|pidfd)\]|inotify|\[fanotify\]|\[eventfd\d*\])"
)
_ANONYMOUS_REMEDIES = {
    "[io_uring]": "set UV_USE_IO_URING=0 for libuv, USE_IO_URING=0 for others",
    "[userfaultfd]": "turn off what moves memory in user space",
    "[perf_event]": "end the profiler",
    "bpf-prog": "end the tracer",
    "bpf-map": "end the tracer",
}
# Character devices that CRIU knows, by major number: memory devices (null, zero, urandom), ttys,
# ptmx, and pseudo-terminals. The nvidia ones are emptied by the CUDA checkpoint, not dumped.
_KNOWN_MAJORS = {1, 4, 5, *range(136, 144)}
_SOCKET_TABLES = (
    *("tcp", "tcp6", "udp", "udp6", "udplite", "udplite6", "raw", "raw6"),
    *("unix", "netlink", "packet"),
)
_STATES_OF_CONNECTION = {"01", "02", "03", "04", "05", "08", "09", "0B"}


def check(cell: Cell, root: int, network: Network) -> None:
    """Raises NotDumpableError that names every obstacle."""
    found = list(obstacles(cell, root, network))
    if found:
        raise NotDumpableError(
            f"the server holds {len(found)} thing{'s' * (len(found) > 1)} that CRIU cannot dump",
            cause="\n".join(str(obstacle) for obstacle in found),
            hint="end or turn off what is named above and snapshot again",
        )


def obstacles(cell: Cell, root: int, network: Network) -> Iterator[Obstacle]:
    """Every obstacle in the cell, process by process."""
    tree = processes.tree(cell, root)
    for pid in processes.pids(cell):
        name = processes.command(cell, pid)
        if pid not in tree:
            yield Obstacle(
                pid=pid,
                command=name,
                where="the process",
                what="has left the server's process tree, so it would be missing after a restore",
                remedy="start it in the foreground",
            )
            continue
        for where, what, remedy in _of_process(cell, pid, network):
            yield Obstacle(pid=pid, command=name, where=where, what=what, remedy=remedy)


def _of_process(cell: Cell, pid: int, network: Network) -> Iterator[tuple[str, str, str]]:
    fields = processes.status(cell, pid)
    if fields.get("TracerPid", "0") != "0":
        yield "the process", "is traced by a debugger", "detach it"
    if fields.get("Seccomp") == "1":
        yield "the process", "is in seccomp strict mode", "start it without"
    tables = _socket_inodes(cell, pid)
    outside = _outside_connections(cell, pid) if network is Network.HOST else {}
    for fd, target in processes.descriptors(cell, pid):
        if finding := _of_descriptor(cell, pid, fd, target, tables, outside):
            yield (f"descriptor {fd} ({target})", *finding)
    for path in processes.mapped_paths(cell, pid):
        if finding := _of_mapping(path):
            yield (f"mapping {path}", *finding)


def _of_descriptor(
    cell: Cell, pid: int, fd: int, target: str, tables: set[str], outside: dict[str, str]
) -> tuple[str, str] | None:
    if target.startswith("anon_inode:"):
        if _KNOWN_ANONYMOUS.fullmatch(target):
            return None
        kind = target.removeprefix("anon_inode:")
        return "is a kernel object that CRIU does not know", _ANONYMOUS_REMEDIES.get(kind, "close it")
    if target.startswith("socket:["):
        inode = target.removeprefix("socket:[").removesuffix("]")
        if inode not in tables:
            return "is a socket of a family that CRIU does not know", "close it"
        if inode in outside:
            return f"is connected to {outside[inode]}, which will not be there", "close the connection"
        return None
    if target.startswith("/secretmem"):
        return "is secret memory, which the kernel hides from CRIU too", "turn it off"
    if target.startswith("/dev/"):
        with contextlib.suppress(OSError):
            status = (processes.proc(cell) / str(pid) / "fd" / str(fd)).stat()
            major = os.major(status.st_rdev)
            if stat.S_ISBLK(status.st_mode):
                return "is a block device", "close it"
            if stat.S_ISCHR(status.st_mode) and major not in _KNOWN_MAJORS and "/nvidia" not in target:
                return "is a device that CRIU does not know", "close it"
    return None


def _of_mapping(path: str) -> tuple[str, str] | None:
    if path.startswith("/SYSV"):
        return "is System V shared memory", "use POSIX shared memory"
    if path.startswith("anon_inode:") and "i915" not in path:
        return "is memory of a kernel object that CRIU does not know", "turn it off"
    if path.startswith("/secretmem"):
        return "is secret memory, which the kernel hides from CRIU too", "turn it off"
    return None


def _socket_inodes(cell: Cell, pid: int) -> set[str]:
    """The inodes of all sockets of families that CRIU dumps, in a process's network."""
    found = set()
    for name in _SOCKET_TABLES:
        with contextlib.suppress(OSError):
            lines = (processes.proc(cell) / str(pid) / "net" / name).read_text().splitlines()
            column = {"unix": 6, "netlink": 9, "packet": 8}.get(name, 9)
            found |= {fields[column] for line in lines[1:] if len(fields := line.split()) > column}
    return found


def _outside_connections(cell: Cell, pid: int) -> dict[str, str]:
    """The TCP connections of the network that lead to other machines: inode and remote address."""
    found = {}
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            table = Path(processes.proc(cell) / str(pid) / "net" / name).read_text().splitlines()[1:]
            for fields in map(str.split, table):
                here, there = processes.address(fields[1])[0], processes.address(fields[2])
                if fields[3] in _STATES_OF_CONNECTION and there[0] != here:
                    found[fields[9]] = f"{there[0]} port {there[1]}"
    return found
