# SPDX-License-Identifier: Apache-2.0
"""A process that does with memory what it is told, in a cell with a memory file."""

import contextlib
import json
import os
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rekindle.cell import MEMORY_PLACE, Cell, Command, MemoryFiles, Network
from tests.conftest import SERVERS
from tests.servers.memory_actor import PAGE, START

DONTNEED, FREE, REMOVE, DONTNEED_LOCKED = 4, 8, 9, 24


WIPEONFORK, COLLAPSE, GUARD_INSTALL, GUARD_REMOVE = 18, 25, 102, 103


MAYMOVE, FIXED, DONTUNMAP = 1, 2, 4


# In pages: where, how many, from where in the file. The kernel makes one mapping of the first three.
AREAS = [[0, 32, 0], [32, 32, 32], [64, 16, 64], [96, 32, 80]]


FILE_PAGES, FILE_HOLE = 112, range(64, 80)


@dataclass
class Actor:
    """A process in a cell that does as it is told: tests/servers/memory_actor.py."""

    cell: Cell
    channel: socket.socket
    path: Path

    def do(self, *operation: Any) -> Any:
        self.channel.sendall(json.dumps(operation).encode() + b"\n")
        answer = b""
        while not answer.endswith(b"\n"):
            part = self.channel.recv(1 << 20)
            assert part, "the process died"
            answer += part
        return json.loads(answer)


@contextlib.contextmanager
def actor(directory: Path, log: Path, *, supervised: bool) -> Iterator[Actor]:
    ranges = [(START + page * PAGE, START + (page + count) * PAGE) for page, count, _ in AREAS]
    ours, theirs = socket.socketpair()
    with ours, theirs, Cell() as cell:
        cell.enter(Network.PRIVATE)
        cell.spawn(
            Command(
                argv=[sys.executable, "-I", "-S", "-B", str(SERVERS / "memory_actor.py"), "3"],
                env={},
                cwd=Path("/"),
                files={0: Path(os.devnull), 1: log, 2: log},
                fds={3: theirs.fileno()},
                memory=MemoryFiles(directory=directory, ranges=ranges) if supervised else None,
            )
        )
        theirs.close()
        ours.settimeout(60)
        yield Actor(cell, ours, (MEMORY_PLACE if supervised else directory) / "1")


def write_memory_file(directory: Path) -> None:
    directory.mkdir(exist_ok=True)
    with open(directory / "1", "wb") as file:
        for page in range(FILE_PAGES):
            if page not in FILE_HOLE:
                file.seek(page * PAGE)
                file.write(f"page {page}\n".encode() * (PAGE // 16))
        file.truncate(FILE_PAGES * PAGE)
