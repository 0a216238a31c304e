# SPDX-License-Identifier: Apache-2.0
"""The number of processes and threads that may be started here."""

import contextlib
from pathlib import Path

from rekindle.node.control_groups import CGROUPS, OWN_GROUPS, directories, numbers


def available(own_groups: Path = OWN_GROUPS, cgroups: Path = CGROUPS) -> int | None:
    """Return how many tasks our control groups still allow; None for no limit."""
    found = []
    for directory in directories("pids", own_groups, cgroups):
        with contextlib.suppress(OSError, ValueError):  # no limit, or the root
            limit, used = numbers(directory, "pids.max", "pids.current")
            found.append(max(0, limit - used))
    return min(found, default=None)
