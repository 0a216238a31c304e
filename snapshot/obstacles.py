# SPDX-License-Identifier: Apache-2.0
"""Find what CRIU cannot dump in a server before the dump, and name it with its remedy.

The rules follow CRIU 4.2.1: `criu/files.c` (descriptors), `criu/sockets.c` (socket families) and
`criu/proc_parse.c` (mappings).
"""

import contextlib
import os
import re
import stat
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from msgspec import Struct

from rekindle.cell import Cell, Command, Network, processes
from rekindle.criu import GHOST_LIMIT_BYTES
from rekindle.errors import NotDumpableError


class Obstacle(Struct, frozen=True, kw_only=True):
    """Something that CRIU cannot dump. `where` is a descriptor, a mapping or the process itself."""

    pid: int
    command: str
    where: str
    what: str
    remedy: str

    def __str__(self) -> str:
        return f"process {self.pid} ({self.command}), {self.where}: {self.what}; {self.remedy}"


_CAT_SECONDS = 10.0
Finding = tuple[str, str]  # what is wrong, and the remedy

_SECRET_MEMORY = ("is secret memory, which the OS kernel hides from CRIU", "turn it off")

# Anonymous inodes that CRIU dumps; every other one is an obstacle.
_KNOWN_ANONYMOUS = re.compile(
    r"anon_inode:(?:\[(?:eventfd|eventpoll|timerfd|signalfd|pidfd)\]|inotify|\[fanotify\]|\[eventfd\d*\])"
)
_ANONYMOUS_REMEDIES = {
    "[io_uring]": "set UV_USE_IO_URING=0 for libuv, USE_IO_URING=0 for others",
    "[userfaultfd]": "turn off the feature that handles page faults in user space",
    "[perf_event]": "end the profiler",
    "bpf-prog": "end the tracer",
    "bpf-map": "end the tracer",
}
# Character devices that CRIU knows, by major number: memory devices (null, zero, urandom), ttys,
# ptmx, and pseudo-terminals.
_KNOWN_MAJORS = {1, 4, 5, *range(136, 144)}
# The tables of /proc/net, and the column of the socket's inode.
_SOCKET_TABLES = {
    **dict.fromkeys(("tcp", "tcp6", "udp", "udp6", "udplite", "udplite6", "raw", "raw6"), 9),
    "unix": 6,
    "netlink": 9,
    "packet": 8,
}
# The names of protocols that CRIU knows, as the OS kernel gives them in an extended attribute of a socket.
_KNOWN_PROTOCOLS = {
    *("TCP", "TCPv6", "UDP", "UDPv6", "UDP-Lite", "UDPLITEv6", "RAW", "RAWv6"),
    *("UNIX", "UNIX-STREAM", "NETLINK", "PACKET"),
}
_NVIDIA = "/dev/nvidia"
_GPUS = (_NVIDIA, "/dev/kfd", "/dev/dri/")
# By path alone. They stay obstacles where the other NVIDIA devices are none.
_NAMED = {
    "/dev/infiniband/": ("is RDMA, whose state cannot be saved", "set NCCL_IB_DISABLE=1"),
    "/dev/nvidia-caps-imex-channels/": ("is memory shared over NVLink", "set NCCL_NVLS_ENABLE=0"),
    "/dmabuf:": ("is GPU memory shared with others", "turn CUDA IPC and RDMA off, or use one GPU"),
}
_CONNECTED_STATES = {"01", "02", "03", "04", "05", "08", "09", "0B"}


def require_dumpable(
    cell: Cell, root: int, network: Network, *, own: Collection[Path], work: Path, gpus: bool = False
) -> None:
    """Raise NotDumpableError, which names every obstacle, if there is any.

    `own` are the server's logs, which a restore replaces. With `gpus`, NVIDIA devices are no obstacles: the
    CUDA checkpoint that follows closes them.
    """
    found = [*obstacles(cell, root, network, own, gpus=gpus), *_system_v(cell, work)]
    if found:
        raise NotDumpableError(
            f"the server holds {len(found)} thing{'s' * (len(found) > 1)} that CRIU cannot dump",
            cause="\n".join(str(obstacle) for obstacle in found),
            hint="remove each of these, then snapshot again",
        )


def obstacles(
    cell: Cell, root: int, network: Network, own: Collection[Path], *, gpus: bool = False
) -> Iterator[Obstacle]:
    """Yield every obstacle in the cell, process by process."""
    strays = processes.strays(cell, root)
    for pid in processes.pids(cell):
        name = processes.command(cell, pid)
        if pid in strays:
            yield Obstacle(
                pid=pid,
                command=name,
                where="the process",
                what="has left the server's process tree, and would be missing after a restore",
                remedy="start it in the foreground",
            )
            continue
        for where, what, remedy in _of_process(cell, pid, network, own, gpus=gpus):
            yield Obstacle(pid=pid, command=name, where=where, what=what, remedy=remedy)


def _of_process(
    cell: Cell, pid: int, network: Network, own: Collection[Path], *, gpus: bool
) -> Iterator[tuple[str, str, str]]:
    fields = processes.status(cell, pid)
    if fields.get("TracerPid", "0") != "0":
        yield "the process", "is traced by a debugger", "detach it"
    if fields.get("Seccomp") == "1":
        yield "the process", "is in seccomp strict mode", "start it without that mode"
    sockets = _sockets(cell, pid, network)
    for fd, target in processes.descriptors(cell, pid):
        named = next((found for prefix, found in _NAMED.items() if target.startswith(prefix)), None)
        if gpus and target.startswith(_NVIDIA) and not named:
            continue
        finding = named or _of_descriptor(processes.proc(cell) / str(pid) / "fd" / str(fd), target, sockets)
        if not finding and Path(target) not in own:
            finding = _of_writing(cell, pid, fd, target)
        if finding:
            yield (f"descriptor {fd} ({target})", *finding)
    for path in processes.mapped_paths(cell, pid):
        if finding := _of_mapping(path):
            yield (f"mapping {path}", *finding)


def _of_descriptor(link: Path, target: str, sockets: Mapping[str, Finding | None]) -> Finding | None:
    if target.startswith("anon_inode:"):
        if _KNOWN_ANONYMOUS.fullmatch(target):
            return None
        kind = target.removeprefix("anon_inode:")
        return "is an OS kernel object unknown to CRIU", _ANONYMOUS_REMEDIES.get(kind, "close it")
    if target.startswith("socket:["):
        inode = target.removeprefix("socket:[").removesuffix("]")
        return sockets[inode] if inode in sockets else _of_unlisted_socket(link)
    if target.startswith("/secretmem"):
        return _SECRET_MEMORY
    if target.startswith("/"):
        with contextlib.suppress(OSError):
            return _of_file(link.stat(), target)
    return None


def _of_file(status: os.stat_result, target: str) -> Finding | None:
    if stat.S_ISBLK(status.st_mode):
        return "is a block device", "close it"
    if stat.S_ISCHR(status.st_mode) and os.major(status.st_rdev) not in _KNOWN_MAJORS:
        if target.startswith(_GPUS):
            return "is a GPU whose state cannot be saved", "see `rekindle doctor`"
        return "is a device unknown to CRIU", "close it"
    if target.endswith(" (deleted)") and status.st_nlink and not target.startswith("/dev/shm/"):  # noqa: S108
        return "is a deleted file with other hard links", "keep such files below $TMPDIR"
    if not status.st_nlink and (stored := status.st_blocks * 512) > GHOST_LIMIT_BYTES:
        return f"is a deleted file of {stored:,} bytes on the disk, more than CRIU stores", "do not delete it"
    return None


def _of_writing(cell: Cell, pid: int, fd: int, target: str) -> Finding | None:
    """Return a finding for a file that is open for writing.

    It may change after the snapshot, which then does not fit it, and replicas would all write to it.
    """
    if target.startswith(("/dev/", "/proc/", "/memfd:")) or not target.startswith("/"):
        return None
    process = processes.proc(cell) / str(pid)
    with contextlib.suppress(OSError):
        status = (process / "fd" / str(fd)).stat()
        fields = (process / "fdinfo" / str(fd)).read_text().split()
        flags = int(fields[fields.index("flags:") + 1], 8)
        if (
            stat.S_ISREG(status.st_mode)
            and status.st_nlink
            and status.st_size  # an empty file is a lock
            and flags & os.O_ACCMODE != os.O_RDONLY
        ):
            return "is open for writing", "log to stdout or stderr, and keep other files below $TMPDIR"
    return None


def _system_v(cell: Cell, work: Path) -> Iterator[Obstacle]:
    """Yield the System V IPC objects of the cell. CRIU dumps them only with their namespace, unlike us."""
    for table, what in (("sem", "semaphores"), ("msg", "message queue"), ("shm", "shared memory")):
        listing = work / f"sysvipc-{table}"  # read in the cell: /proc/sysvipc shows the reader's namespace
        command = Command(
            argv=["cat", f"/proc/sysvipc/{table}"],
            env={"PATH": os.defpath},
            cwd=Path("/"),
            files={0: Path(os.devnull), 1: listing, 2: Path(os.devnull)},
        )
        if cell.run(command, _CAT_SECONDS) == 0:
            for row in listing.read_text().splitlines()[1:]:
                yield Obstacle(
                    pid=0,
                    command="any",
                    where=f"System V id {row.split()[1]}",
                    what=f"System V {what}, which would be missing after a restore",
                    remedy="use POSIX semaphores, queues and shared memory",
                )


def _of_mapping(path: str) -> tuple[str, str] | None:
    if path.startswith("/SYSV"):
        return "is System V shared memory", "use POSIX shared memory"
    if path.startswith("anon_inode:") and "i915" not in path:
        return "is memory of an OS kernel object unknown to CRIU", "turn it off"
    if path.startswith("/secretmem"):
        return _SECRET_MEMORY
    return None


def _sockets(cell: Cell, pid: int, network: Network) -> dict[str, Finding | None]:
    """Return the sockets of known families in a process's network, by inode.

    The value is the finding for a socket that is an obstacle, else None.
    """
    found: dict[str, Finding | None] = {}
    for name, column in _SOCKET_TABLES.items():
        with contextlib.suppress(OSError):
            lines = (processes.proc(cell) / str(pid) / "net" / name).read_text().splitlines()[1:]
            for fields in (line.split(maxsplit=column + 1) for line in lines):
                if len(fields) > column:
                    found[fields[column]] = None
                if name == "unix" and len(fields) > column + 1:
                    found[fields[column]] = _of_unix_path(fields[column + 1])
                if name.startswith("tcp") and network is Network.HOST:
                    found[fields[column]] = _of_connection(fields)
    return found


def _of_unlisted_socket(link: Path) -> Finding | None:
    """Return a finding for a socket that no table of /proc/net lists, unless CRIU knows its protocol.

    The tables list no TCP or UDP socket that is not connected or bound, or whose connection was reset: a
    client that goes away between a request and the dump leaves such sockets for a moment.
    """
    with contextlib.suppress(FileNotFoundError):  # the process has closed it
        name = os.getxattr(link, "system.sockprotoname").rstrip(b"\0").decode()
        if name not in _KNOWN_PROTOCOLS:
            return f"is a socket of a family unknown to CRIU ({name})", "close it"
    return None


def _of_unix_path(path: str) -> Finding | None:
    if path.startswith(("@", "/dev/shm/")):  # noqa: S108 - both are private to the cell
        return None
    return f"is bound to {path}, which replicas would take from each other", "put it below $TMPDIR"


def _of_connection(fields: Sequence[str]) -> Finding | None:
    (here, _), (there, port) = processes.address(fields[1]), processes.address(fields[2])
    if fields[3] not in _CONNECTED_STATES or here == there:
        return None
    return f"is connected to {there} port {port}, which is lost after a restore", "close the connection"
