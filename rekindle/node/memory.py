# SPDX-License-Identifier: Apache-2.0
"""Find the available memory of this node, within the limits of our control groups."""

import contextlib
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_GROUPS = Path("/proc/self/cgroup")
_MEMINFO = Path("/proc/meminfo")


def available_bytes(meminfo: Path = _MEMINFO) -> int | None:
    """Return the memory available to us, or None if the OS kernel does not report it (before 3.14).

    Not by psutil, which reads the same line: a restore would have to wait for its import.
    """
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return within_groups(int(line.split()[1]) * 1024)
    return None


def within_groups(available: int, own_groups: Path = _OWN_GROUPS, cgroups: Path = _CGROUPS) -> int:
    """Return the part of the available memory that our control groups (version 2) allow us.

    It includes their page cache that can be reclaimed.
    """
    found = [available]
    groups: list[str] = []
    with contextlib.suppress(OSError):
        groups = own_groups.read_text().splitlines()
    for group in [line.removeprefix("0::/") for line in groups if line.startswith("0::/")]:
        for directory in (cgroups / group, *(cgroups / group).parents):
            with contextlib.suppress(OSError, ValueError):
                limit, used = (int((directory / f"memory.{name}").read_text()) for name in ("max", "current"))
                counts = dict(line.split() for line in (directory / "memory.stat").read_text().splitlines())
                found.append(limit - used + int(counts.get("inactive_file", 0)))  # reclaimed on demand
    return max(0, min(found))
