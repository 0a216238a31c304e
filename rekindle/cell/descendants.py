# SPDX-License-Identifier: Apache-2.0
"""Read /proc about the descendants of a process, such as a cell's init. PIDs are those on the host."""

import contextlib
from pathlib import Path

from rekindle.proc import children


def of(ancestor: int) -> list[int]:
    """List the PIDs of every descendant of a process, parents first."""
    found = [ancestor]
    for pid in found:
        found += children(Path(f"/proc/{pid}"))
    return found[1:]


def cpu_ticks(ancestor: int) -> dict[int, int]:
    """Return the processor time that each descendant of a process has used, by its PID on the host."""
    found = {}
    for pid in of(ancestor):
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            found[pid] = int(fields[11]) + int(fields[12])  # utime, stime
    return found


def stuck(ancestor: int) -> list[str]:
    """Describe the descendants of a process that wait in the OS kernel where no signal reaches them (D)."""
    found = []
    for pid in of(ancestor):
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{pid}/task").iterdir():
                if (task / "stat").read_text().rpartition(")")[2].split()[0] == "D":
                    name = Path(f"/proc/{pid}/comm").read_text().strip()  # the thread's says little
                    where = (task / "wchan").read_text().strip("0") or "an unknown place"
                    found.append(f"{name} (PID {pid}, {inner_pid(pid)} in the cell) waits in {where}")
                    break
    return found


def inner_pid(pid: int) -> int:
    """Return the PID in its own namespace of a process given by its PID on the host; 0 if it is gone."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("NSpid:"):
                return int(line.split()[-1])
    return 0
