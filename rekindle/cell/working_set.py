# SPDX-License-Identifier: Apache-2.0
"""Find the parts of their memory files that the processes of a cell have touched."""

from pathlib import Path

from rekindle.cell import MEMORY_PLACE, Cell, page_tables, processes

JOINED_BYTES = 64 << 10


def touched(cell: Cell) -> dict[str, list[tuple[int, int]]]:
    """Return the touched stretches of each memory file, as {name: [(offset, length in bytes), …]}."""
    within = f"{MEMORY_PLACE}/"
    found = page_tables.touched(
        processes.host_pids(cell), lambda path: path.startswith(within), joined_bytes=JOINED_BYTES
    )
    return {Path(path).name: stretches for path, stretches in found.items()}
