# SPDX-License-Identifier: Apache-2.0
"""Find the terminals that CRIU cannot dump. The rule follows CRIU 4.2.1, `criu/tty.c`: tty_verify_ctty."""

import contextlib
import re
from pathlib import Path

from rekindle.cell import Cell, processes
from snapshot.socket_obstacles import Finding

_PTS_MAJOR = 136
_INDEX = re.compile(r"^tty-index:\s*(\d+)$", re.MULTILINE)


def of_terminal(cell: Cell, pid: int, target: str) -> Finding | None:
    """Return a finding for /dev/tty, if a process before this one has that terminal open, too.

    A shell in a pseudo-terminal is such a process: the one that started it has the other end.
    """
    if target != "/dev/tty" or (number := _controlling(processes.proc(cell) / str(pid))) is None:
        return None
    for other in processes.pids(cell):
        if other < pid and _has_open(cell, other, number):
            whose = f"process {other} ({processes.command(cell, other)})"
            return f"is its controlling terminal, which {whose} has open", "end the terminal's shell"
    return None


def _controlling(process: Path) -> int | None:
    """Return the number of the pseudo-terminal that controls a process; None if there is none."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        device = int(
            (process / "stat").read_text().rpartition(")")[2].split()[4]
        )  # tty_nr in proc_pid_stat(5)
        if (device >> 8 & 0xFFF) == _PTS_MAJOR:
            return device & 0xFF | device >> 12 & 0xFFF00
    return None


def _has_open(cell: Cell, pid: int, number: int) -> bool:
    """Return whether a process has an end of a pseudo-terminal open."""
    for fd, target in processes.descriptors(cell, pid):
        if target == f"/dev/pts/{number}":
            return True
        if target.endswith("/ptmx"):
            with contextlib.suppress(OSError):
                text = (processes.proc(cell) / str(pid) / "fdinfo" / str(fd)).read_text()
                if (found := _INDEX.search(text)) and int(found[1]) == number:
                    return True
    return False
