# SPDX-License-Identifier: Apache-2.0
"""The resource limits of a process, by the names of getrlimit(2) in lower case."""

import resource

NAMES = (
    *("cpu", "fsize", "data", "stack", "core", "rss", "nproc", "nofile"),
    *("memlock", "as", "locks", "sigpending", "msgqueue", "nice", "rtprio", "rttime"),
)
"""The limits by their numbers, which are the same on x86-64 and arm64."""

UNLIMITED = -1


def of_process(pid: int = 0) -> dict[str, tuple[int, int]]:
    """Return the soft and the hard limits of a process, by default our own. Raises OSError."""
    return {name: resource.prlimit(pid, number) for number, name in enumerate(NAMES)}


def is_within(value: int, limit: int) -> bool:
    """Tell whether a value, which may itself be a limit, is not above a limit."""
    return limit == UNLIMITED or (value != UNLIMITED and value <= limit)
