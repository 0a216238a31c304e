# SPDX-License-Identifier: Apache-2.0
"""Make a dump as small as it can be, and its memory files."""

from pathlib import Path

from rekindle.cell import untraced
from rekindle.criu import inherited, timers, zero_pages
from rekindle.criu.memory_files import MemoryFile, move_memory
from rekindle.criu.seccomp import drop_filter


def compact(tree: Path, root: int) -> list[MemoryFile]:
    """Take zero pages and what was inherited out of a dump, and move large memory into memory files."""
    for leftover in ("dump.log", "criu.out"):
        (tree / "criu" / leftover).unlink(missing_ok=True)
    zero_pages.drop(tree / "criu")
    inherited.drop(tree / "criu", root)
    timers.rearm(tree / "criu")
    if untraced.FILTER:
        drop_filter(tree / "criu", untraced.FILTER)
    return move_memory(tree / "criu", tree / "memory")
