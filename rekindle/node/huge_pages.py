# SPDX-License-Identifier: Apache-2.0
"""Huge pages: those that processes have mapped, and those that this node could give them.

A mapping of huge pages reserves all of them (Linux, Documentation/admin-guide/mm/hugetlbpage.rst).
"""

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated

from msgspec import Meta, Struct

from rekindle.node.control_groups import CGROUPS, OWN_GROUPS, directories, numbers

_POOLS = Path("/sys/kernel/mm/hugepages")


class HugePages(Struct, frozen=True, kw_only=True):
    """A number of huge pages of one size."""

    page_bytes: Annotated[int, Meta(ge=1, le=1 << 40)]
    pages: Annotated[int, Meta(ge=1, le=1 << 40)]


def of_smaps(texts: Iterable[str]) -> tuple[HugePages, ...]:
    """Return the huge pages that processes have mapped, given their /proc/PID/smaps.

    What several of them share counts once.
    """
    mapped: dict[int, set[tuple[str, int]]] = {}
    for text in texts:
        start = end = offset = size = 0
        file = ""
        for line in text.splitlines():
            fields = line.split()
            if "-" in fields[0]:
                start, end = (int(each, 16) for each in fields[0].split("-"))
                offset, file = int(fields[2], 16), f"{fields[3]} {fields[4]}"
            elif fields[0] == "KernelPageSize:":
                size = int(fields[1]) * 1024
            elif fields[0] == "VmFlags:" and "ht" in fields[1:]:
                numbers = range(offset // size, (offset + end - start) // size)
                mapped.setdefault(size, set()).update((file, number) for number in numbers)
    return tuple(HugePages(page_bytes=size, pages=len(pages)) for size, pages in sorted(mapped.items()))


def available(
    pools: Path = _POOLS, own_groups: Path = OWN_GROUPS, cgroups: Path = CGROUPS
) -> Mapping[int, int]:
    """Return how many huge pages of each size in bytes may be reserved here, within our control groups."""
    found: Counter[int] = Counter()
    with contextlib.suppress(OSError):
        for pool in pools.iterdir():
            kib = pool.name.removeprefix("hugepages-").removesuffix("kB")
            names = ("free", "resv", "nr_overcommit", "surplus")
            with contextlib.suppress(OSError, ValueError):
                free, reserved, more, surplus = (_read(pool, name) for name in names)
                size = int(kib) * 1024
                there = max(0, free - reserved) + max(0, more - surplus)
                found[size] = min([there, *(left // size for left in _allowed(size, own_groups, cgroups))])
    return found


def _allowed(size: int, own_groups: Path, cgroups: Path) -> Iterator[int]:
    """Yield the bytes of huge pages of a size that each of our control groups still allows.

    A pod that has asked for none is allowed none, whatever the node has.
    """
    unit = (
        f"{size >> 30}GB" if size >= 1 << 30 else f"{size >> 20}MB" if size >= 1 << 20 else f"{size >> 10}KB"
    )
    for directory in directories("hugetlb", own_groups, cgroups):
        for kind in (f"hugetlb.{unit}", f"hugetlb.{unit}.rsvd"):
            for names in (("max", "current"), ("limit_in_bytes", "usage_in_bytes")):
                with contextlib.suppress(OSError, ValueError):
                    limit, used = numbers(directory, *(f"{kind}.{name}" for name in names))
                    yield max(0, limit - used)


def _read(pool: Path, name: str) -> int:
    return int((pool / f"{name}_hugepages").read_text())
