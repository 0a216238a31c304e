# SPDX-License-Identifier: Apache-2.0
"""Give restored processes what a start here would have given them, and what they had set for themselves.

The cell's init uses this module under `python -I -S`: it imports only the standard library, and little of it.
In the cell, processes and threads have the IDs of the record, and init has what rekindle itself has: its
limits, CPUs and priorities. Restored processes have inherited them through CRIU, with two exceptions: CRIU
raises its limit of open files, and sets the scheduling policy and nice value of every thread.
"""

import contextlib
import ctypes
import os
import resource
import socket

_IOPRIO_SET = {"x86_64": 251, "aarch64": 30}
_IOPRIO_WHO_PROCESS = 1
_PIDFD_GETFD = 438  # the same number on every architecture
_libc = ctypes.CDLL(None, use_errno=True)


def adjust(processes: list) -> list[str]:  # type: ignore[type-arg]
    """Set everything, and return what could not be set. A process that is gone is left out."""
    problems: list[str] = []
    _inherit()
    here = os.sched_getaffinity(0)
    for process in processes:
        pid = process["pid"]
        for number, wanted in process["limits"]:
            with _noting(problems, f"limit {number} of process {pid}"):
                _set_limit(pid, number, wanted)
        for name in ("oom_score_adj", "coredump_filter"):
            if process[name] is not None:
                with _noting(problems, f"{name} of process {pid}"):
                    _write(f"/proc/{pid}/{name}", process[name])
        for thread in process["threads"]:
            with _noting(problems, f"settings of thread {thread['tid']}"):
                _set_thread(thread, here)
        for fd, options, congestion in process["sockets"]:
            with _noting(problems, f"options of socket {fd} of process {pid}"):
                _set_options(pid, fd, options, congestion)
    return problems


@contextlib.contextmanager
def _noting(problems: list[str], what: str):  # type: ignore[no-untyped-def]
    try:
        yield
    except (ProcessLookupError, FileNotFoundError):
        pass
    except (OSError, ValueError) as error:
        problems.append(f"{what}: {error}")


def _inherit() -> None:
    """Give all processes our own limit of open files, and all threads our own priority."""
    open_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    nice, policy = os.getpriority(os.PRIO_PROCESS, 0), os.sched_getscheduler(0)
    priority = os.sched_getparam(0)
    for name in os.listdir("/proc"):  # noqa: PTH208
        if not name.isdecimal() or name == "1":
            continue
        with contextlib.suppress(OSError, ValueError):
            resource.prlimit(int(name), resource.RLIMIT_NOFILE, open_files)
        if not (nice or policy):
            continue  # CRIU has set them to that
        with contextlib.suppress(OSError):
            for tid in map(int, os.listdir(f"/proc/{name}/task")):  # noqa: PTH208
                os.setpriority(os.PRIO_PROCESS, tid, nice)
                os.sched_setscheduler(tid, policy, priority)


def _set_limit(pid: int, number: int, wanted: list) -> None:  # type: ignore[type-arg]
    """Set a limit, whose soft and hard value may each be inherited, as far as the hard limit allows."""
    soft, hard = resource.prlimit(pid, number)
    hard = hard if wanted[1] is None else wanted[1]
    soft = soft if wanted[0] is None else wanted[0]
    if hard != resource.RLIM_INFINITY:
        soft = hard if soft == resource.RLIM_INFINITY else min(soft, hard)
    resource.prlimit(pid, number, (soft, hard))


def _set_thread(thread: dict, here: set[int]) -> None:  # type: ignore[type-arg]
    tid = thread["tid"]
    if cpus := here.intersection(thread["cpus"]):
        os.sched_setaffinity(tid, cpus)
    if "nice" in thread:
        os.setpriority(os.PRIO_PROCESS, tid, thread["nice"])
    if "policy" in thread:
        os.sched_setscheduler(tid, thread["policy"], os.sched_param(thread.get("priority", 0)))
    call = _IOPRIO_SET.get(os.uname().machine)
    if call and "io_priority" in thread:
        _checked(_libc.syscall(call, _IOPRIO_WHO_PROCESS, tid, thread["io_priority"]))
    if "timer_slack_ns" in thread:
        _write(f"/proc/{tid}/timerslack_ns", thread["timer_slack_ns"])


def _set_options(pid: int, fd: int, options: list, congestion: str) -> None:  # type: ignore[type-arg]
    """Set options of a socket, by a duplicate of its descriptor. Raises OSError for the last that failed."""
    process = os.pidfd_open(pid)
    try:
        duplicate = _checked(_libc.syscall(_PIDFD_GETFD, process, fd, 0))
    finally:
        os.close(process)
    failed = None
    with socket.socket(fileno=duplicate) as sock:
        if congestion:
            options = [*options, (socket.IPPROTO_TCP, socket.TCP_CONGESTION, congestion.encode())]
        for level, name, value in options:
            try:
                sock.setsockopt(level, name, value)
            except OSError as error:
                failed = OSError(error.errno, f"option {level}/{name}: {error.strerror}")
    if failed:
        raise failed


def _checked(result: int) -> int:
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def _write(path: str, value: int) -> None:
    with open(path, "w") as file:
        file.write(str(value))
