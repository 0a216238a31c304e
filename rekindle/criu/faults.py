# SPDX-License-Identifier: Apache-2.0
"""Know what older versions of CRIU get wrong and newer ones right.

Each was seen with the servers of the tests, on Linux 6.18. A version that cannot be read counts as older.
`rekindle doctor` runs without the dependencies, and imports this.
"""

import re
from typing import NamedTuple


class Fault(NamedTuple):
    """A fault of CRIU before the version `fixed_in`, in words that follow "CRIU X"."""

    what: str
    fixed_in: tuple[int, ...]
    source: str

    @property
    def right(self) -> str:
        """Return the first version that is right, as text."""
        return ".".join(map(str, self.fixed_in))


# 4.2.1 ends with "Can't dump that handle"; 4.3 dumps and restores the watch.
WATCH_ON_OVERLAYFS = Fault(
    what="cannot dump an inotify watch on overlayfs, the root of most containers",
    fixed_in=(4, 3),
    source="checkpoint-restore/criu#2854, #3048",
)
FAULTS = (WATCH_ON_OVERLAYFS,)


def of(version: str) -> frozenset[Fault]:
    """Return the faults that a version of CRIU has."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    numbers = tuple(map(int, match[0].split("."))) if match else ()
    return frozenset(fault for fault in FAULTS if numbers < fault.fixed_in)
