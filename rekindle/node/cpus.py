# SPDX-License-Identifier: Apache-2.0
"""The CPUs that we may use: those we may run on, and how much of them our control groups allow."""

import contextlib
import os
from pathlib import Path

from rekindle.node.control_groups import CGROUPS, OWN_GROUPS, directories


def of_thread(tid: int = 0) -> str:
    """Return the CPUs on which a thread may run, by default this one, as text. Raises OSError."""
    return as_text(sum(1 << cpu for cpu in os.sched_getaffinity(tid)))


def as_text(mask: int) -> str:
    """Return CPUs, a bit for each, as the OS kernel prints them: `0-3,8`."""
    found = []
    first = 0
    while mask >> first:
        first += ((mask >> first) & -(mask >> first)).bit_length() - 1
        after = first + (~(mask >> first) & ((mask >> first) + 1)).bit_length() - 1
        found.append(f"{first}-{after - 1}" if after > first + 1 else str(first))
        first = after
    return ",".join(found)


def mask(text: str) -> int:
    """Return a bit for each CPU of a text as the OS kernel prints it."""
    found = 0
    for part in text.split(",") if text else []:
        first, _, last = part.partition("-")
        found |= (2 << int(last or first)) - (1 << int(first))
    return found


def numbers(text: str) -> list[int]:
    """Return the numbers of the CPUs of a text as the OS kernel prints it."""
    found = mask(text)
    return [cpu for cpu in range(found.bit_length()) if found >> cpu & 1]


def quota(own_groups: Path = OWN_GROUPS, cgroups: Path = CGROUPS) -> float:
    """Return how many CPUs' time our control groups (version 1 or 2) allow us; 0 if they do not limit it."""
    limits = [0.0]
    for directory in directories("cpu", own_groups, cgroups):
        for read in (_quota_v1, _quota_v2):
            with contextlib.suppress(OSError, ValueError):
                limits.append(read(directory))
    return min((limit for limit in limits if limit), default=0.0)


def _quota_v2(directory: Path) -> float:
    allowed, period = (directory / "cpu.max").read_text().split()
    return 0.0 if allowed == "max" else round(int(allowed) / int(period), 3)


def _quota_v1(directory: Path) -> float:
    allowed = int((directory / "cpu.cfs_quota_us").read_text())
    return max(0.0, round(allowed / int((directory / "cpu.cfs_period_us").read_text()), 3))
