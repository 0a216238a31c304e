# SPDX-License-Identifier: Apache-2.0
"""What a server holds that CRIU cannot dump: found before the dump, and named with its remedy.

The rules follow CRIU 4.2.1: `criu/files.c` (which descriptors it knows), `criu/sockets.c` (which
families), `criu/proc_parse.c` (which mappings).
"""

import contextlib
import os
import re
import stat
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rekindle.cell import Cell, Command, Network, processes
from rekindle.criu import GHOST_LIMIT_BYTES
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


_CAT_SECONDS = 10.0
Finding = tuple[str, str]  # what is wrong, and the remedy

_SECRET_MEMORY = ("is secret memory, which the kernel hides from CRIU too", "turn it off")

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
# ptmx, and pseudo-terminals.
_KNOWN_MAJORS = {1, 4, 5, *range(136, 144)}
# The tables of /proc/net, and the column with the socket's inode.
_SOCKET_TABLES = {
    **dict.fromkeys(("tcp", "tcp6", "udp", "udp6", "udplite", "udplite6", "raw", "raw6"), 9),
    "unix": 6,
    "netlink": 9,
    "packet": 8,
}
_NVIDIA = "/dev/nvidia"
_GPUS = (_NVIDIA, "/dev/kfd", "/dev/dri/")
# Of whatever kind the kernel says that they are; also where CUDA's own devices are no obstacle.
_NAMED = {
    "/dev/infiniband/": ("is RDMA, whose state nobody can save", "set NCCL_IB_DISABLE=1"),
    "/dev/nvidia-caps-imex-channels/": ("is memory shared over NVLink", "set NCCL_NVLS_ENABLE=0"),
    "/dmabuf:": ("is GPU memory that others may use", "turn CUDA IPC and RDMA off, or use one GPU"),
}
_STATES_OF_CONNECTION = {"01", "02", "03", "04", "05", "08", "09", "0B"}


def check(
    cell: Cell, root: int, network: Network, *, own: Collection[Path], work: Path, gpus: bool = False
) -> None:
    """Raises NotDumpableError that names every obstacle. `own` are the logs that a restore replaces. With
    `gpus`, NVIDIA's devices are none: their state will be checkpointed, and then they must be gone."""
    found = [*obstacles(cell, root, network, own, gpus=gpus), *_system_v(cell, work)]
    if found:
        raise NotDumpableError(
            f"the server holds {len(found)} thing{'s' * (len(found) > 1)} that CRIU cannot dump",
            cause="\n".join(str(obstacle) for obstacle in found),
            hint="end or turn off what is named above and snapshot again",
        )


def obstacles(
    cell: Cell, root: int, network: Network, own: Collection[Path], *, gpus: bool = False
) -> Iterator[Obstacle]:
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
        for where, what, remedy in _of_process(cell, pid, network, own, gpus=gpus):
            yield Obstacle(pid=pid, command=name, where=where, what=what, remedy=remedy)


def _of_process(
    cell: Cell, pid: int, network: Network, own: Collection[Path], *, gpus: bool
) -> Iterator[tuple[str, str, str]]:
    fields = processes.status(cell, pid)
    if fields.get("TracerPid", "0") != "0":
        yield "the process", "is traced by a debugger", "detach it"
    if fields.get("Seccomp") == "1":
        yield "the process", "is in seccomp strict mode", "start it without"
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
        return "is a kernel object that CRIU does not know", _ANONYMOUS_REMEDIES.get(kind, "close it")
    if target.startswith("socket:["):
        inode = target.removeprefix("socket:[").removesuffix("]")
        unknown = ("is a socket of a family that CRIU does not know", "close it")
        return sockets.get(inode, unknown)
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
            return "is a GPU of which nothing tells how to save its state", "see `rekindle doctor`"
        return "is a device that CRIU does not know", "close it"
    if target.endswith(" (deleted)") and status.st_nlink and not target.startswith("/dev/shm/"):  # noqa: S108
        return "is a deleted file that has other names", "keep such files below $TMPDIR"
    if not status.st_nlink and status.st_size > GHOST_LIMIT_BYTES:
        return f"is a deleted file of {status.st_size:,} bytes, more than CRIU stores", "keep its name"
    return None


def _of_writing(cell: Cell, pid: int, fd: int, target: str) -> Finding | None:
    """A file that grows does not fit its snapshot any more, and replicas would write to one file."""
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
            and status.st_size  # an empty one is a lock
            and flags & os.O_ACCMODE != os.O_RDONLY
        ):
            return "is open for writing", "log to stdout or stderr, and keep other files below $TMPDIR"
    return None


def _system_v(cell: Cell, work: Path) -> Iterator[Obstacle]:
    """System V IPC objects of the cell. CRIU dumps them with their namespace only, and we dump none."""
    for table, what in (("sem", "semaphores"), ("msg", "message queue"), ("shm", "shared memory")):
        listing = work / f"sysvipc-{table}"  # the kernel shows a reader that of the reader's namespace
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
        return "is memory of a kernel object that CRIU does not know", "turn it off"
    if path.startswith("/secretmem"):
        return _SECRET_MEMORY
    return None


def _sockets(cell: Cell, pid: int, network: Network) -> dict[str, Finding | None]:
    """The sockets of a process's network that are of a family that CRIU knows, by inode, each with what
    is wrong with it, if anything is."""
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


def _of_unix_path(path: str) -> Finding | None:
    """Sockets in the cell's /dev/shm and abstract ones are the cell's own."""
    if path.startswith(("@", "/dev/shm/")):  # noqa: S108
        return None
    return f"is bound to {path}, which every replica would take from the others", "put it below $TMPDIR"


def _of_connection(fields: Sequence[str]) -> Finding | None:
    (here, _), (there, port) = processes.address(fields[1]), processes.address(fields[2])
    if fields[3] not in _STATES_OF_CONNECTION or here == there:
        return None
    return f"is connected to {there} port {port}, which will not be there", "close the connection"
