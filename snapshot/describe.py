# SPDX-License-Identifier: Apache-2.0
"""What a record says of the server that was dumped."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rekindle.cell import Cell, processes
from rekindle.engine import Endpoint, Engine
from rekindle.engine.caches import CacheRoot
from rekindle.node.mapped import MappedFile, describe
from rekindle.record import Record


@dataclass(frozen=True, slots=True, kw_only=True)
class Dumped:
    """What came of it: the record of the dump, and where the server's kernel caches can be read."""

    record: Record
    caches: Sequence[CacheRoot]


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A server as it stood before the dump: where it listens, the PID that gets its signals (inside the
    cell), its threads, and the files that its processes have mapped or open, but for its own output."""

    endpoint: Endpoint
    server_pid: int
    threads: int
    opened: set[str]


def listened_endpoint(cell: Cell, engine: Engine) -> Endpoint:
    """Where the server really listens: on every address or on one, which the command need not say."""
    hosts = [each.host for each in processes.listeners(cell) if each.port == engine.endpoint.port]
    host = engine.endpoint.host if engine.endpoint.host in hosts or not hosts else hosts[0]
    return Endpoint(host=host, port=engine.endpoint.port)


def opened_files(cell: Cell, pids: Sequence[int]) -> set[str]:
    """What the processes have mapped or open."""
    paths: set[str] = set()
    for pid in pids:
        paths |= set(processes.mapped_paths(cell, pid))
        paths |= {target for _, target in processes.descriptors(cell, pid)}
    return paths


def readable_path(path: str, tree: Path) -> Path:
    """Where a file can be read that the server saw at a path: its /dev/shm lies beside the dump now."""
    inside = path.removeprefix("/dev/shm/")  # noqa: S108
    return tree / "shm" / inside if inside != path else Path(path)


def mapped_files(opened: set[str]) -> list[MappedFile]:
    """The files outside the cell's /dev/shm that must be there, and the same, at a restore. What was deleted
    while it was open is not among them: CRIU stores its content."""
    paths = [
        path
        for path in sorted(opened)
        if path.startswith("/") and not path.startswith(("/dev/", "/proc/", "/memfd:", "/SYSV"))
    ]
    return [file for path in paths if (file := describe(path)) is not None]
