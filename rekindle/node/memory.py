# SPDX-License-Identifier: Apache-2.0
"""Find the available memory of this node, within the limits of our control groups."""

import contextlib
from pathlib import Path

from rekindle.node.control_groups import CGROUPS, OWN_GROUPS, directories, numbers

_MEMINFO = Path("/proc/meminfo")
# The limit and the use of a control group, of version 2 and 1, and in its memory.stat what can be reclaimed.
_FILES = {
    ("memory.max", "memory.current"): "inactive_file",
    ("memory.limit_in_bytes", "memory.usage_in_bytes"): "total_inactive_file",
}


def available_bytes(meminfo: Path = _MEMINFO) -> int | None:
    """Return the memory available to us, or None if the OS kernel does not report it (before 3.14).

    Not by psutil, which reads the same line: a restore would have to wait for its import.
    """
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return within_groups(int(line.split()[1]) * 1024)
    return None


def within_groups(available: int, own_groups: Path = OWN_GROUPS, cgroups: Path = CGROUPS) -> int:
    """Return the part of the available memory that our control groups allow us.

    It includes their page cache that can be reclaimed.
    """
    found = [available]
    for directory in directories("memory", own_groups, cgroups):
        for names, inactive in _FILES.items():
            with contextlib.suppress(OSError, ValueError):
                limit, used = numbers(directory, *names)
                counts = dict(line.split() for line in (directory / "memory.stat").read_text().splitlines())
                found.append(limit - used + int(counts.get(inactive, 0)))  # reclaimed on demand
    return max(0, min(found))
