# SPDX-License-Identifier: Apache-2.0
"""Dump a server that is not in a cell, without changing anything of it."""

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path

from rekindle.cell import Cell, Network, processes
from rekindle.criu import Criu, connections, sessions
from rekindle.criu.frozen import FrozenDump
from rekindle.errors import NotDumpableError
from rekindle.report import Report
from snapshot.outside_connections import OUTSIDE_REMEDY, Ending
from snapshot.outside_connections import find as find_outside

_SHM = "/dev/shm/"  # noqa: S108


def freeze(
    tool: Criu,
    cell: Cell,
    root: int,
    directory: Path,
    work: Path,
    frozen: contextlib.ExitStack,
    report: Report,
) -> Callable[[], tuple[str, ...]]:
    """Dump the server, which stays frozen until `frozen` is left.

    Returns what closes, in the dump, the connections that lead out of the server, and returns their names.
    """
    unix = {
        inode: each
        for inode, each in find_outside(cell, root, Network.PRIVATE, work).items()
        if not each.dumpable
    }
    if fixed := sorted(each.name for each in unix.values() if each.ending is not Ending.IN_IMAGE):
        raise NotDumpableError(
            "the server has connections that can only be closed in the server itself",
            cause=", ".join(fixed),
            hint=OUTSIDE_REMEDY,
        )
    options = [] if os.getsid(root) == root else ["--shell-job"]
    external = [f"unix[{inode}]" for inode in unix]
    if report.pause is not None:
        report.pause.begin(time.monotonic(), 0)
        frozen.callback(report.pause.end)
    dump = FrozenDump(tool, cell, root, directory, logs=work, external=external, options=options)
    frozen.enter_context(dump)

    def close() -> tuple[str, ...]:
        sessions.lead(directory, root)
        tcp = connections.close(directory, list(unix), tcp=True)
        return (*sorted(each.name for each in unix.values()), *sorted(f"tcp:{each}" for each in tcp))

    return close


def of_others(cell: Cell, directory: Path) -> set[str]:
    """Return the names of what is in /dev/shm and not the server's, which is frozen.

    What CRIU has linked there, to find it again, is the server's: CRIU removes it when the server runs on.
    """
    own = set()
    for pid in processes.tree(cell, cell.only or 0):
        paths = [*processes.mapped_paths(cell, pid), *(path for _, path in processes.descriptors(cell, pid))]
        own |= {path[len(_SHM) :].split("/")[0] for path in paths if path.startswith(_SHM)}
    content = (directory / "files.img").read_bytes()
    return {
        entry.name
        for entry in os.scandir(_SHM)
        if entry.name not in own
        and not (entry.name.startswith("link_remap.") and f"{_SHM[1:]}{entry.name}".encode() in content)
    }
