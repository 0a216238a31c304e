# SPDX-License-Identifier: Apache-2.0
"""Read what the processes of a server have set for themselves: see rekindle/cell/settings.py."""

import contextlib
import errno
import os
from pathlib import Path

from msgspec import Struct

from rekindle.cell import Cell, descendants, processes
from rekindle.cell.settings import Groups, ProcessSettings, ThreadSettings
from rekindle.cell.socket_options import read_options
from rekindle.node import cpus, limits
from rekindle.node.credentials import InheritedCredentials

_CAP_DAC_OVERRIDE, _CAP_SETGID = 1 << 1, 1 << 6
_POLICY_MASK = ~getattr(os, "SCHED_RESET_ON_FORK", 0x40000000)
_TIME_SHARED = {os.SCHED_OTHER, os.SCHED_BATCH, os.SCHED_IDLE}
_DEFAULT_POLICIES = {"", "default", "local"}  # "local" is what the default does


def read_settings(cell: Cell, root: int) -> tuple[ProcessSettings, ...]:
    """Return the settings of every process of the cell but the root, which has what all of them inherited.

    Processes that end meanwhile are left out, and without the root so are all.
    """
    outside = processes.host_pids_by_inner(cell)
    found: list[ProcessSettings] = []
    try:
        inherited = _Inherited.of(outside[root])
    except (KeyError, ProcessLookupError, FileNotFoundError):
        return ()
    sockets: set[int] = set()
    for inner, pid in sorted(outside.items()):
        if inner != root:
            with contextlib.suppress(ProcessLookupError, FileNotFoundError):  # it has ended
                found.append(_read(inner, pid, inherited, sockets))
    return tuple(found)


class _Inherited(Struct, frozen=True, kw_only=True):
    """The settings of the root of the process tree."""

    limits: dict[str, tuple[int, int]]
    oom_score_adj: int | None
    coredump_filter: int | None
    thread: ThreadSettings
    memory_policy: str
    credentials: InheritedCredentials

    @classmethod
    def of(cls, pid: int) -> "_Inherited":
        return cls(
            limits=limits.of_process(pid),
            oom_score_adj=_number(pid, "oom_score_adj"),
            coredump_filter=_number(pid, "coredump_filter", 16),
            thread=_thread(pid, pid),
            memory_policy=_thread_policy(pid),
            credentials=InheritedCredentials.of_process(pid),
        )


def _read(inner: int, pid: int, inherited: _Inherited, sockets: set[int]) -> ProcessSettings:
    changed = {}
    for name, (soft, hard) in limits.of_process(pid).items():
        was_soft, was_hard = inherited.limits[name]
        if (soft, hard) != (was_soft, was_hard):
            changed[name] = (None if soft == was_soft else soft, None if hard == was_hard else hard)
    threads = []
    policies = []
    for tid in sorted(map(int, os.listdir(f"/proc/{pid}/task"))):  # noqa: PTH208
        with contextlib.suppress(OSError):  # the thread has ended
            policies.append(_thread_policy(tid))
            found = _changed(_thread(descendants.inner_pid(tid), tid), inherited.thread)
            if found != ThreadSettings(tid=found.tid):
                threads.append(found)
    policies += _policies(pid)
    others = sorted({each for each in policies if each not in {inherited.memory_policy, *_DEFAULT_POLICIES}})
    status = _status(pid)
    return ProcessSettings(
        pid=inner,
        limits=changed,
        oom_score_adj=_unless(_number(pid, "oom_score_adj"), inherited.oom_score_adj),
        coredump_filter=_unless(_number(pid, "coredump_filter", 16), inherited.coredump_filter),
        groups=_groups(pid, inherited.credentials),
        memory_policy=" ".join(others)[:1000],
        open_files=1 + max((int(fd) for fd in os.listdir(f"/proc/{pid}/fd")), default=-1),  # noqa: PTH208
        locked_bytes=status.get("VmLck", 0),
        address_bytes=status.get("VmSize", 0),
        threads=tuple(threads),
        sockets=tuple(read_options(pid, sockets)),
    )


def _groups(pid: int, inherited: InheritedCredentials) -> Groups:
    has = InheritedCredentials.of_process(pid)
    if (has.gid, has.groups) != (inherited.gid, inherited.groups):
        return Groups.OWN
    return Groups.INHERITED if has.permitted & (_CAP_SETGID | _CAP_DAC_OVERRIDE) else Groups.BOUND


def _unless(value: int | None, inherited: int | None) -> int | None:
    return None if value == inherited else value


def _thread(inner: int, tid: int) -> ThreadSettings:
    """Return all settings of a thread, whose ID in the cell is `inner`. Raises OSError if it has ended."""
    import psutil

    policy = os.sched_getscheduler(tid)
    try:
        ionice = psutil.Process(tid).ionice()
    except psutil.NoSuchProcess:
        raise ProcessLookupError(errno.ESRCH, f"thread {tid} has ended") from None
    return ThreadSettings(
        tid=inner,
        cpus=cpus.of_thread(tid),
        nice=os.getpriority(os.PRIO_PROCESS, tid),
        policy=policy,
        priority=os.sched_getparam(tid).sched_priority,
        io_priority=int(ionice.ioclass) << 13 | ionice.value,
        # A real-time thread has none, and gets its default back when it is none any longer.
        timer_slack_ns=_number(tid, "timerslack_ns") if policy & _POLICY_MASK in _TIME_SHARED else None,
    )


def _changed(thread: ThreadSettings, inherited: ThreadSettings) -> ThreadSettings:
    """Return a thread's settings without those that it inherited."""
    has_policy = (thread.policy, thread.priority) != (inherited.policy, inherited.priority)
    return ThreadSettings(
        tid=thread.tid,
        cpus="" if thread.cpus == inherited.cpus else thread.cpus,
        nice=_unless(thread.nice, inherited.nice),
        policy=thread.policy if has_policy else None,
        priority=thread.priority if has_policy else 0,
        io_priority=_unless(thread.io_priority, inherited.io_priority),
        timer_slack_ns=_unless(thread.timer_slack_ns, inherited.timer_slack_ns),
    )


def _number(pid: int, name: str, base: int = 10) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        return int(Path(f"/proc/{pid}/{name}").read_text(), base)
    return None


def _status(pid: int) -> dict[str, int]:
    """Return the sizes in /proc/PID/status, in bytes."""
    found = {}
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if value.endswith(" kB"):
            found[name] = int(value.removesuffix(" kB")) * 1024
    return found


def _policies(pid: int) -> list[str]:
    """Return the NUMA policies of a process's mappings."""
    found: dict[str, None] = {}
    with contextlib.suppress(OSError), open(f"/proc/{pid}/numa_maps") as file:
        for fields in map(str.split, file):
            found.setdefault(fields[1])
    return list(found)


def _thread_policy(tid: int) -> str:
    """Return the NUMA policy of a thread; "" if unknown.

    It is that of a mapping without its own. A short read has the OS kernel walk the pages of a few mappings,
    not of all: this is asked of each thread.
    """
    with contextlib.suppress(OSError), open(f"/proc/{tid}/numa_maps", "rb", buffering=0) as file:
        fields = file.read(128).split()
        return fields[1].decode() if len(fields) > 1 else ""
    return ""
