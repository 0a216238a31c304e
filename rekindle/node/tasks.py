# SPDX-License-Identifier: Apache-2.0
"""The number of processes and threads that may be started here."""

import contextlib
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_GROUPS = Path("/proc/self/cgroup")


def available(own_groups: Path = _OWN_GROUPS, cgroups: Path = _CGROUPS) -> int | None:
    """Return how many tasks our control groups (version 2) still allow; None for no limit."""
    found = []
    groups: list[str] = []
    with contextlib.suppress(OSError):
        groups = own_groups.read_text().splitlines()
    for group in [line.removeprefix("0::/") for line in groups if line.startswith("0::/")]:
        for directory in (cgroups / group, *(cgroups / group).parents):
            with contextlib.suppress(OSError, ValueError):  # "max", or above the root
                limit, used = (int((directory / f"pids.{name}").read_text()) for name in ("max", "current"))
                found.append(max(0, limit - used))
    return min(found, default=None)
