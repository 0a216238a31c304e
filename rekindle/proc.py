# SPDX-License-Identifier: Apache-2.0
"""Facts from the OS kernel about processes and this boot."""

import contextlib
import os
import struct
import time
from collections.abc import Iterable
from pathlib import Path

_PF_EXITING = 4  # linux/sched.h
_AT_RANDOM = 25  # linux/auxvec.h


def boot_id() -> str:
    """Return the OS kernel's random identifier of this boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def privileges() -> dict[str, str]:
    """Return what decides whether we may make namespaces and mounts, and the OS kernel and boot."""
    found = {"kernel": os.uname().release, "boot": boot_id()}
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in {"CapPrm", "CapEff", "CapBnd", "Seccomp", "NoNewPrivs"}:
            found[name] = value.strip()
    for name in ("user", "pid", "cgroup"):
        found[name] = str(Path(f"/proc/self/ns/{name}").readlink())
    with contextlib.suppress(OSError):
        found["label"] = Path("/proc/self/attr/current").read_text().strip("\0\n")
    return found


def standing() -> str:
    """Return what of our privileges is the same in each container of a kind, as one line."""
    found = privileges()
    for name in ("kernel", "boot", "user", "pid", "cgroup"):  # the latter are new in each container
        del found[name]
    found["users"] = " ".join(Path("/proc/self/uid_map").read_text().split())
    return " ".join(f"{name}={value}" for name, value in found.items())


def has_filter() -> bool:
    """Tell whether this process has a filter of system calls, as most containers have."""
    return privileges().get("Seccomp", "0") != "0"


def has_capability(number: int) -> bool:
    """Tell whether this process has a capability, by its number in linux/capability.h."""
    return bool(int(privileges().get("CapEff", "0"), 16) >> number & 1)


def at_random(place: Path) -> bytes:
    """Return the random bytes that the OS kernel gave a program at its start, by its directory in /proc.

    They are in its memory, and so in its dump. Empty if they cannot be read.
    """
    with contextlib.suppress(OSError, ValueError):
        for kind, address in struct.iter_unpack("@NN", (place / "auxv").read_bytes()):
            if kind == _AT_RANDOM:
                with open(place / "mem", "rb", buffering=0) as memory:
                    memory.seek(address)
                    return memory.read(16)
    return b""


def children(process: Path) -> list[int]:
    """List the children of a process, of all its threads, given its directory in a /proc.

    Of a thread or process that is gone, and of an OS kernel without CONFIG_PROC_CHILDREN, none.
    """
    found: list[int] = []
    with contextlib.suppress(OSError):
        for thread in (process / "task").iterdir():
            with contextlib.suppress(OSError):
                found += map(int, (thread / "children").read_text().split())
    return found


def peak_rss_bytes() -> int:
    """Return this process's peak resident memory.

    Not from getrusage, which starts with the parent's peak if it started us by vfork.
    """
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))


def start_ticks(pid: int | str) -> int:
    """Return when a process started, in clock ticks since the boot. Raises OSError if there is none."""
    with open(f"/proc/{pid}/stat") as file:
        return int(file.read().rsplit(")", 1)[1].split()[19])


def process_age() -> float:
    """Return the seconds since this process started, with a resolution of 10 ms."""
    started = start_ticks("self") / os.sysconf("SC_CLK_TCK")
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started)


def not_ending(seconds: float = 1.0) -> dict[int, str]:
    """Return the names of processes that are stuck in the OS kernel in their exit, by PID.

    Waits to see whether those that are found end within some seconds.
    """
    found = _exiting()
    if found:
        time.sleep(seconds)
        later = _exiting()
        found = {pid: name for pid, name in found.items() if pid in later}
    return found


def _exiting() -> dict[int, str]:
    """Return the names of the processes of which a thread waits in its exit where no signal reaches it."""
    found = {}
    for process in Path("/proc").iterdir():
        if process.name.isdecimal():
            with contextlib.suppress(OSError):
                for task in (process / "task").iterdir():
                    fields = (task / "stat").read_text().rpartition(")")[2].split()
                    if fields[0] == "D" and int(fields[6]) & _PF_EXITING:
                        found[int(process.name)] = (process / "comm").read_text().strip()
    return found


def memory_bytes(pids: Iterable[int]) -> tuple[int, int]:
    """Return the bytes of the anonymous and shared memory of processes, and of their mapped files in memory.

    From the OS kernel's counters per process: memory that two processes share counts twice.
    """
    own = files = 0
    for pid in pids:
        with contextlib.suppress(OSError, ValueError):
            for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                name, _, value = line.partition(":")
                if name in {"RssAnon", "RssShmem"}:
                    own += int(value.split()[0]) * 1024
                elif name == "RssFile":
                    files += int(value.split()[0]) * 1024
    return own, files
