# SPDX-License-Identifier: Apache-2.0
"""What a command may leave behind: processes, mounts, shared memory, temporary files.

Others use the machine meanwhile, and nothing of theirs may count. So tests that look at a machine have one of
their own, as far as namespaces go (`take_own_machine`), and of its processes they look at their descendants,
of which none gets lost (`adopting_orphans`). A namespace outlives a command by a process in it or by a mount.
"""

import contextlib
import ctypes
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from rekindle.cell import init, surroundings

TMP, SHM = Path("/tmp"), Path("/dev/shm")
_PR_SET_CHILD_SUBREAPER, _PR_GET_CHILD_SUBREAPER = 36, 37


def take_own_machine(place: Path, keep: Sequence[Path]) -> tuple[int, int]:
    """Moves this thread, and what it starts from now on, to a network with nothing but a loopback interface,
    and to mounts of its own, with a /tmp, a /var/tmp and a /dev/shm of its own. Needs root.

    /tmp lies in the directory `place`; what is in `keep` stays where it is. Mounts spread as they do on most
    machines, so what escapes from a cell is seen. Returns descriptors of the mount and the network namespace
    that it came from.
    """
    outside = (os.open("/proc/self/ns/mnt", os.O_RDONLY), os.open("/proc/self/ns/net", os.O_RDONLY))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(init.CLONE_NEWNS | init.CLONE_NEWNET) == -1:
        raise OSError(ctypes.get_errno(), "unshare")
    surroundings.raise_loopback()
    _run("mount", "--make-rprivate", "/")
    own = place / "tmp"
    own.mkdir()
    own.chmod(0o1777)
    _run("mount", "--bind", str(own), str(own))
    for name in {path.relative_to(TMP).parts[0] for path in keep if TMP in path.parents}:
        (own / name).mkdir()
        _run("mount", "--rbind", str(TMP / name), str(own / name))
    _run("mount", "--move", str(own), str(TMP))
    (place / "var-tmp").mkdir()
    (place / "var-tmp").chmod(0o1777)
    _run("mount", "--bind", str(place / "var-tmp"), "/var/tmp")
    _run("mount", "-t", "tmpfs", "-o", "mode=1777", "tmpfs", str(SHM))
    _run("mount", "--make-rshared", "/")
    return outside


def _run(*words: str) -> None:
    subprocess.run(words, check=True, stdin=subprocess.DEVNULL, timeout=30)


@dataclass(frozen=True, slots=True)
class Traces:
    """What there is that a command might leave behind. Processes are told apart by PID, since
    titles change."""

    processes: dict[int, str]
    mounts: frozenset[str]
    shared_memory: frozenset[str]
    temporary: frozenset[str]

    @classmethod
    def now(cls) -> "Traces":
        return cls(
            processes=descendants(),
            mounts=frozenset(Path("/proc/self/mountinfo").read_text().splitlines()),
            shared_memory=frozenset(map(str, SHM.iterdir())),
            temporary=frozenset(map(str, TMP.iterdir())),
        )

    def since(self) -> dict[str, list[str]]:
        """What is there now and was not there then, by kind."""
        now = Traces.now()
        left = {
            "processes": [f"{pid} {now.processes[pid]}" for pid in now.processes.keys() - self.processes],
            "mounts": sorted(now.mounts - self.mounts),
            "shared memory": sorted(now.shared_memory - self.shared_memory),
            "temporary files": sorted(now.temporary - self.temporary),
        }
        return {kind: values for kind, values in left.items() if values}

    def wait_until_nothing_is_left(self, seconds: float = 10) -> None:
        """Fails if more is there than was at this time. Processes with much memory take a while to go."""
        deadline = time.monotonic() + seconds
        while left := self.since():
            assert time.monotonic() < deadline, f"left behind: {left}"
            time.sleep(0.05)


def descendants(of: int = 0) -> dict[int, str]:
    """The command lines of the processes below this one, or below another, by PID; of those that live."""
    found = {}
    for process in psutil.Process(of or None).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                found[process.pid] = " ".join(process.cmdline())
    return found


def children() -> dict[int, str]:
    """Our children that live, by PID; those that have ended, and that nobody waits for, are reaped."""
    found = {}
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            for pid in map(int, (task / "children").read_text().split()):
                with contextlib.suppress(ChildProcessError, psutil.NoSuchProcess):
                    if os.waitpid(pid, os.WNOHANG) == (0, 0):
                        found[pid] = " ".join(psutil.Process(pid).cmdline())
    return found


@contextlib.contextmanager
def adopting_orphans() -> Iterator[None]:
    """Within, a process whose parent has ended becomes a child of ours: none gets out of sight."""
    libc = ctypes.CDLL(None)
    before = ctypes.c_int()
    libc.prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(before), 0, 0, 0)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        libc.prctl(_PR_SET_CHILD_SUBREAPER, before.value, 0, 0, 0)
        children()
