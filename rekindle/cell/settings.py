# SPDX-License-Identifier: Apache-2.0
"""The settings that the processes of a server have made for themselves: limits, CPUs, priorities.

Everything else of that kind they inherited from the rekindle that started them. So a restored server inherits
it again, from the rekindle that restores it, as if it had been started there. What it set itself is recorded,
and set again after CRIU is done. A record has only differences from the root of the process tree: a shell,
which still has what rekindle had.
"""

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Annotated, Any

from msgspec import Meta, Struct

from rekindle import documents
from rekindle.documents import Count
from rekindle.node import cpus, limits

_THREADS_LIMIT = 1 << 16
_LIMITS = len(limits.NAMES)
_Pid = Annotated[int, Meta(ge=2, le=(1 << 22) - 1)]
CpuList = Annotated[
    str, Meta(pattern=documents.whole(r"(?:[0-9]{1,4}(?:-[0-9]{1,4})?(?:,(?!$)|$))*"), max_length=1 << 14)
]
"""CPUs as the OS kernel prints them: `0-3,8`; "" for none."""
_Limit = Annotated[int, Meta(ge=limits.UNLIMITED, le=(1 << 63) - 1)]

SocketOption = tuple[
    Annotated[int, Meta(ge=0, le=1 << 16)],
    Annotated[int, Meta(ge=0, le=1 << 16)],
    Annotated[int, Meta(ge=-(1 << 31), le=(1 << 31) - 1)],
]


class ThreadSettings(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The settings that a thread has made for itself; None and "" mean that it inherited it.

    `cpus` are the CPUs that it is bound to. `policy` and `priority` are those of sched_setscheduler(2),
    `io_priority` is that of ioprio_set(2).
    """

    tid: _Pid
    cpus: CpuList = ""
    nice: Annotated[int, Meta(ge=-20, le=19)] | None = None
    policy: Annotated[int, Meta(ge=0, le=(1 << 31) - 1)] | None = None
    priority: Annotated[int, Meta(ge=0, le=99)] = 0
    io_priority: Annotated[int, Meta(ge=0, le=0xFFFF)] | None = None
    timer_slack_ns: Count | None = None


class SocketSettings(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The options of a socket that CRIU loses: (level, name, value) of setsockopt(2), congestion control."""

    fd: Annotated[int, Meta(ge=0, le=(1 << 31) - 1)]
    options: Annotated[tuple[SocketOption, ...], Meta(max_length=1000)] = ()
    congestion: Annotated[str, Meta(pattern=documents.whole(r"[a-z0-9_-]{0,15}"))] = ""


class Groups(StrEnum):
    """The origin of a process's groups.

    With OWN it has set them itself. Otherwise it has inherited them: with INHERITED it may set others, or
    open every file anyhow; with BOUND it has no such capability.
    """

    OWN = "own"
    INHERITED = "inherited"
    BOUND = "bound"


class ProcessSettings(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The settings that a process has made for itself, and how much it uses of what is limited.

    `limits` are those that it changed, soft and hard; None means inherited. `groups` says whose its
    groups are. `open_files` is its highest
    descriptor + 1. `memory_policy` is a policy for NUMA nodes, as in numa(7); "" for none.
    """

    pid: _Pid
    limits: Annotated[Mapping[str, tuple[_Limit | None, _Limit | None]], Meta(max_length=_LIMITS)] = {}
    oom_score_adj: Annotated[int, Meta(ge=-1000, le=1000)] | None = None
    coredump_filter: Annotated[int, Meta(ge=0, le=0xFFFF_FFFF)] | None = None
    groups: Groups = Groups.INHERITED
    memory_policy: Annotated[str, Meta(max_length=1000)] = ""
    open_files: Count = 0
    locked_bytes: Count = 0
    address_bytes: Count = 0
    threads: Annotated[tuple[ThreadSettings, ...], Meta(max_length=_THREADS_LIMIT)] = ()
    sockets: Annotated[tuple[SocketSettings, ...], Meta(max_length=_THREADS_LIMIT)] = ()


def to_apply(processes: Sequence[ProcessSettings]) -> list[dict[str, Any]]:
    """Return what `adjust.py`, which runs in the cell, is to set."""
    found = []
    for process in processes:
        threads = []
        for thread in process.threads:
            each = documents.to_json(thread)
            threads.append({**each, "cpus": cpus.numbers(thread.cpus)})
        numbers = {
            limits.NAMES.index(name): wanted
            for name, wanted in process.limits.items()
            if name in limits.NAMES
        }
        found.append(
            {
                "pid": process.pid,
                "limits": list(numbers.items()),
                "oom_score_adj": process.oom_score_adj,
                "coredump_filter": process.coredump_filter,
                "threads": threads,
                "sockets": [(each.fd, each.options, each.congestion) for each in process.sockets],
            }
        )
    return found
