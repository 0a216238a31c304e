# SPDX-License-Identifier: Apache-2.0
"""Find the control groups that we are in, of version 1 and 2."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")


def directories(controller: str, own_groups: Path = OWN_GROUPS, cgroups: Path = CGROUPS) -> Iterator[Path]:
    """Yield the directories of our groups with a controller, and of all groups above them.

    In a container, the paths may be those of the host, of which only the top is here: our own group.
    """
    lines: list[str] = []
    with contextlib.suppress(OSError):
        lines = own_groups.read_text().splitlines()
    for _, names, group in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if names and controller not in names.split(","):
            continue
        top = cgroups / names if names else cgroups
        directory = top / group.lstrip("/")
        yield directory
        if directory != top:
            for above in directory.parents:
                yield above
                if above == top:
                    break


def numbers(directory: Path, *names: str) -> list[int]:
    """Read a number from each of some files. Raises OSError, and ValueError for another text, as `max`."""
    return [int((directory / name).read_text()) for name in names]
