# SPDX-License-Identifier: Apache-2.0
"""Find what CRIU cannot dump in a server before the dump, and name it with its remedy.

The rules follow CRIU 4.2.1: `criu/files.c` (descriptors), `criu/namespaces.c` and
`criu/proc_parse.c` (mappings). Sockets are in `socket_obstacles.py`, epolls and inotifies in
`watch_obstacles.py`. What is not known is left to CRIU.
"""

import contextlib
import ctypes
import os
import resource
import stat
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from msgspec import Struct, structs

from rekindle.cell import Cell, Command, Network, processes
from rekindle.cell.untraced import KEYS, LANDLOCK
from rekindle.criu import GHOST_LIMIT_BYTES, Criu, faults
from rekindle.errors import NotDumpableError
from snapshot import multicast_obstacles
from snapshot.multicast_obstacles import Group
from snapshot.outside_connections import Outside
from snapshot.outside_connections import find as find_outside
from snapshot.private_paths import PrivatePaths
from snapshot.socket_obstacles import Finding, Sockets
from snapshot.terminal_obstacles import of_terminal
from snapshot.watch_obstacles import of_watcher


class Obstacle(Struct, frozen=True, kw_only=True):
    """Something that CRIU cannot dump. `where` is a descriptor, a mapping or the process itself.

    `others` are further processes that hold the same, as children inherit descriptors.
    """

    pid: int
    command: str
    where: str
    what: str
    remedy: str
    others: int = 0

    def __str__(self) -> str:
        also = f" and {self.others} more" if self.others else ""
        return f"process {self.pid} ({self.command}){also}, {self.where}: {self.what}; {self.remedy}"


_libc = ctypes.CDLL(None, use_errno=True)
_CAT_SECONDS = 10.0
_PROCESS = "the process"

_SECRET_MEMORY = ("is secret memory, which the OS kernel hides from CRIU", "turn it off")

# Objects of the OS kernel that CRIU does not know, by the names of their anonymous inodes, and the remedies.
_ANONYMOUS = {
    "[io_uring]": "deny it (seccomp, sysctl kernel.io_uring_disabled=2); some libuv heed UV_USE_IO_URING=0",
    "[userfaultfd]": "turn off the feature that handles page faults in user space",
    "[perf_event]": "end the profiler",
    "bpf-prog": "end the tracer",
    "bpf-map": "end the tracer",
    "bpf_link": "end the tracer",
    "[landlock-ruleset]": "close it",
    "seccomp notify": "end the supervisor of system calls",
    "kvm-vm": "end the virtual machine",
    "kvm-vcpu": "end the virtual machine",
}
# Character devices that CRIU knows, by major number: memory devices (null, zero, urandom), ttys,
# ptmx, and pseudo-terminals.
_KNOWN_MAJORS = {1, 4, 5, *range(136, 144)}
_MQUEUE_MAGIC = 0x19800202  # linux/magic.h: MQUEUE_MAGIC
# The namespaces that CRIU cannot dump apart from those of the root: their links in /proc/PID/ns, and words.
_NAMESPACES = {
    "mnt": "a mount",
    "uts": "a UTS",
    "ipc": "an IPC",
    "net": "a network",
    "user": "a user",
    "cgroup": "a cgroup",
    "pid": "a PID",
    "time": "a time",
}
# What processes do without a trace in /proc: see rekindle/cell/untraced.py.
_UNTRACED: Mapping[str, Finding] = {
    LANDLOCK: (
        "has restricted itself with Landlock, and a restored process would not be restricted",
        "turn that off, or restrict rekindle instead",
    ),
    KEYS: (
        "uses keys of the OS kernel (keyrings), which would be missing after a restore",
        "keep them in files or in memory",
    ),
}
_NVIDIA = "/dev/nvidia"
_GPUS = (_NVIDIA, "/dev/kfd", "/dev/dri/")
# By path alone. They stay obstacles where the other NVIDIA devices are none.
_NAMED = {
    "/dev/infiniband/": ("is RDMA, whose state cannot be saved", "set NCCL_IB_DISABLE=1"),
    "/dev/nvidia-caps-imex-channels/": ("is memory shared over NVLink", "set NCCL_NVLS_ENABLE=0"),
    "/dmabuf:": ("is GPU memory shared with others", "turn CUDA IPC and RDMA off, or use one GPU"),
}


def require_dumpable(
    cell: Cell,
    root: int,
    network: Network,
    tool: Criu,
    *,
    private: PrivatePaths,
    work: Path,
    outside: Outside,
    gpus: bool = False,
) -> None:
    """Raise NotDumpableError, which names every obstacle, if there is any.

    `private` tells what replicas do not share, `outside` whether connections to the outside are obstacles.
    With `gpus`, NVIDIA devices are none: the CUDA checkpoint that follows closes them.
    """
    found = [
        *_once(
            obstacles(cell, root, network, tool=tool, private=private, work=work, outside=outside, gpus=gpus)
        ),
        *(_system_v(cell, work) if cell.only is None else ()),
    ]
    if found:
        raise NotDumpableError(
            f"the server holds {len(found)} thing{'s' * (len(found) > 1)} that CRIU cannot dump",
            cause="\n".join(str(obstacle) for obstacle in found),
            hint="remove each of these, then snapshot again",
        )


def _once(found: Iterable[Obstacle]) -> list[Obstacle]:
    """Return each descriptor and mapping once, with the first process that holds it."""
    by_object: dict[tuple[str, ...], list[Obstacle]] = {}
    for each in found:
        whose = str(each.pid) if each.where == _PROCESS else ""
        by_object.setdefault((whose, each.where, each.what), []).append(each)
    return [structs.replace(first, others=len(rest)) for first, *rest in by_object.values()]


def obstacles(
    cell: Cell,
    root: int,
    network: Network,
    tool: Criu,
    *,
    private: PrivatePaths,
    work: Path,
    outside: Outside = Outside.REFUSE,
    gpus: bool = False,
) -> Iterator[Obstacle]:
    """Yield every obstacle in the cell, process by process, but for those of the cell as a whole."""
    leading_out = find_outside(cell, root, network, work) if outside is Outside.REFUSE else {}
    leading_out = {inode: each for inode, each in leading_out.items() if not each.dumpable}
    sockets = Sockets(cell, root, private, leading_out)
    strays = processes.strays(cell, root)
    host_pids = processes.host_pids_by_inner(cell)
    found_faults = faults.of(tool.version)
    groups = multicast_obstacles.joined(processes.proc(cell) / str(root) / "net")
    for pid in processes.pids(cell):
        name = processes.command(cell, pid)
        if pid in strays:
            yield Obstacle(
                pid=pid,
                command=name,
                where=_PROCESS,
                what="has left the server's process tree, and would be missing after a restore",
                remedy="start it in the foreground",
            )
            continue
        findings = [
            *_of_process(cell, pid, root, host_pids.get(pid, 0)),
            *_of_descriptors(cell, pid, sockets, private, found_faults, gpus=gpus),
            *_of_memberships(cell, pid, host_pids.get(pid, 0), groups),
            *_of_mappings(cell, pid, private),
        ]
        for where, (what, remedy) in findings:
            yield Obstacle(pid=pid, command=name, where=where, what=what, remedy=remedy)


def _of_process(cell: Cell, pid: int, root: int, host_pid: int) -> Iterator[tuple[str, Finding]]:
    """Yield what is wrong with a process as a whole, as (where, finding)."""
    where = _PROCESS
    fields = processes.status(cell, pid)
    if fields.get("TracerPid", "0") != "0":
        yield where, ("is traced by a debugger", "detach it")
    if fields.get("Seccomp") == "1":
        yield where, ("is in seccomp strict mode", "start it without that mode")
    if fields.get("State", "").startswith("Z") and len(processes.task_ids(cell, pid)) > 1:
        yield where, ("has ended its main thread, and runs on in others", "let the main thread wait for them")
    for each, what in sorted(cell.untraced()):
        if each == pid:
            yield where, _UNTRACED[what]
    for name in _NAMESPACES:
        if _namespace(cell, pid, name) not in {"", _namespace(cell, root, name)}:
            kind = _NAMESPACES[name]
            yield where, (f"is in {kind} namespace of its own", "start it without that sandbox")
    if host_pid and not _may_read_limits(host_pid):
        yield (
            where,
            (
                f"runs as another user ({fields.get('Uid', '?').split()[0]}), whose limits may not be read",
                "add the capability SYS_RESOURCE, or start the server as the same user as rekindle",
            ),
        )


def _namespace(cell: Cell, pid: int, name: str) -> str:
    with contextlib.suppress(OSError):
        return str((processes.proc(cell) / str(pid) / "ns" / name).readlink())
    return ""


def _may_read_limits(host_pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        try:
            resource.prlimit(host_pid, resource.RLIMIT_CPU)
        except PermissionError:
            return False
    return True


def _of_descriptors(
    cell: Cell,
    pid: int,
    sockets: Sockets,
    private: PrivatePaths,
    found_faults: Collection[faults.Fault],
    *,
    gpus: bool,
) -> Iterator[tuple[str, Finding]]:
    process = processes.proc(cell) / str(pid)
    for fd, target in processes.descriptors(cell, pid):
        named = next((found for prefix, found in _NAMED.items() if target.startswith(prefix)), None)
        if gpus and target.startswith(_NVIDIA) and not named:
            continue
        finding = named or _of_descriptor(process / "fd" / str(fd), target, sockets)
        finding = finding or of_watcher(cell, pid, fd, target, found_faults) or of_terminal(cell, pid, target)
        finding = finding or private.refused.get(target)
        if cell.only is None and not finding:  # what was started elsewhere has inherited such files
            finding = _of_mount(process / "fd" / str(fd), target)
        if finding:
            yield f"descriptor {fd} ({target})", finding


def _of_memberships(
    cell: Cell, pid: int, host_pid: int, groups: Sequence[Group]
) -> Iterator[tuple[str, Finding]]:
    for fd, target in processes.descriptors(cell, pid) if groups and host_pid else ():
        is_socket = target.startswith("socket:[")
        if is_socket and (finding := multicast_obstacles.of_membership(host_pid, fd, groups)):
            yield f"descriptor {fd} ({target})", finding


def _of_mappings(cell: Cell, pid: int, private: PrivatePaths) -> Iterator[tuple[str, Finding]]:
    opened = {target for _, target in processes.descriptors(cell, pid)}
    for path in processes.mapped_paths(cell, pid):
        if finding := _of_mapping(path) or (private.refused.get(path) if path not in opened else None):
            yield f"mapping {path}", finding


def _of_descriptor(link: Path, target: str, sockets: Sockets) -> Finding | None:
    if target.startswith("anon_inode:"):
        if remedy := _anonymous_remedy(target):
            return "is an OS kernel object unknown to CRIU", remedy
        return None
    if target.startswith("socket:["):
        return sockets.finding(link, int(target.removeprefix("socket:[").removesuffix("]")))
    if target.startswith("/secretmem"):
        return _SECRET_MEMORY
    if target.startswith("/"):
        with contextlib.suppress(OSError):
            if _file_system(link) == _MQUEUE_MAGIC:
                return "is a POSIX message queue", "use a pipe, a socket or multiprocessing.Queue"
            return _of_file(link.stat(), target)
    return None


def _anonymous_remedy(target: str) -> str | None:
    name = target.removeprefix("anon_inode:")
    return (
        None
        if name == target
        else next((_ANONYMOUS[each] for each in _ANONYMOUS if name.startswith(each)), None)
    )


def _file_system(link: Path) -> int:
    """Return the magic number of the file system of an open file (statfs(2)). Raises OSError."""
    buffer = ctypes.create_string_buffer(256)
    if _libc.statfs(os.fsencode(link), buffer) == -1:
        raise OSError(ctypes.get_errno(), "statfs")
    return int.from_bytes(buffer.raw[:8], sys.byteorder)


def _of_mount(link: Path, target: str) -> Finding | None:
    """Return a finding for a file in a mount that the process does not have (CRIU: "Can't lookup mount").

    Files of the OS kernel's own mounts, as memfds, have no path.
    """
    process = link.parents[1]
    with contextlib.suppress(OSError, ValueError):
        if target.startswith("/") and (process / f"root{target}").exists():
            fields = (process / "fdinfo" / link.name).read_text().split()
            mounts = {line.split()[0] for line in (process / "mountinfo").read_text().splitlines()}
            if fields[fields.index("mnt_id:") + 1] not in mounts:
                return (
                    "was opened by way of a process outside, as /proc/1/fd/1 is",
                    "open /dev/stdout or /dev/stderr instead",
                )
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
        return (
            f"is a deleted file of {stored:,} bytes on the disk, more than CRIU stores",
            "close it, or keep it smaller",
        )
    return None


def _system_v(cell: Cell, work: Path) -> Iterator[Obstacle]:
    """Yield the System V IPC objects of the cell. CRIU dumps them only with their namespace, unlike us."""
    for table, what in (("sem", "semaphores"), ("msg", "message queue"), ("shm", "shared memory")):
        listing = work / f"sysvipc-{table}"  # read in the cell: /proc/sysvipc shows the reader's namespace
        listing.unlink(missing_ok=True)  # of an earlier check; commands append
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


def _of_mapping(path: str) -> Finding | None:
    if path.startswith("/SYSV"):
        return "is System V shared memory", "use POSIX shared memory"
    if remedy := _anonymous_remedy(path):
        return "is memory of an OS kernel object unknown to CRIU", remedy
    if path.startswith("/secretmem"):
        return _SECRET_MEMORY
    return None
