# SPDX-License-Identifier: Apache-2.0
"""Describe a server for its record: where it listens, and which files it uses."""

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from msgspec import Struct, structs

from rekindle.cell import Cell, processes
from rekindle.cell.settings import ProcessSettings
from rekindle.engine import Endpoint, Engine
from rekindle.engine.caches import CacheRoot
from rekindle.node import sampled
from rekindle.node.credentials import InheritedCredentials, inherited_from
from rekindle.node.fingerprint import Fingerprint
from rekindle.node.huge_pages import HugePages, of_smaps
from rekindle.node.loaded import Loaded
from rekindle.node.mapped import MappedFile, describe
from rekindle.record import LISTENERS_LIMIT, Record
from snapshot.private_paths import PrivatePaths
from snapshot.start_reads import StartReads


class Dumped(Struct, frozen=True, kw_only=True):
    """The record of a dump, and the server's kernel caches, with paths that can be read here."""

    record: Record
    caches: Sequence[CacheRoot]


class RunningServer(Struct, frozen=True, kw_only=True):
    """A server just before its dump.

    `listeners` are where it listens, the main address first. `server_pid` is the PID in the cell that gets
    its signals. `threads` is the number of its threads. `opened` are the paths that its processes have
    mapped or open, without its own logs. `settings` are those that its processes have set for themselves,
    `credentials` those that they inherited, None if unknown. `private` are the paths of which each replica
    gets a copy, `huge_pages` those that they have mapped. `reads` is what a start
    would read.
    """

    listeners: tuple[Endpoint, ...]
    server_pid: int
    threads: int
    opened: set[str]
    settings: tuple[ProcessSettings, ...]
    credentials: InheritedCredentials | None
    private: PrivatePaths
    huge_pages: tuple[HugePages, ...]
    reads: StartReads


def listened_endpoint(engine: Engine, listeners: Sequence[Endpoint]) -> Endpoint:
    """Return where the server really listens, which its command need not say: on all addresses or on one."""
    hosts = [each.host for each in listeners if each.port == engine.endpoint.port]
    host = engine.endpoint.host if engine.endpoint.host in hosts or not hosts else hosts[0]
    return Endpoint(host=host, port=engine.endpoint.port)


def listened_endpoints(cell: Cell, pids: Sequence[int]) -> list[Endpoint]:
    """Return every TCP address on which the processes listen, IPv4 before IPv6."""
    inodes = processes.socket_inodes(cell, pids)
    found = {(each.port, each.host) for each in processes.listeners(cell) if each.inode in inodes}
    ordered = sorted(found, key=lambda each: (each[0], ":" in each[1], each[1]))
    return [Endpoint(host=host, port=port) for port, host in ordered]


def main_first(main: Endpoint, listeners: Sequence[Endpoint]) -> tuple[Endpoint, ...]:
    """Return what to record of the addresses: the main one, and the others up to the limit."""
    return (main, *(each for each in listeners if each != main))[:LISTENERS_LIMIT]


def mapped_huge_pages(cell: Cell, pids: Sequence[int]) -> tuple[HugePages, ...]:
    """Return the huge pages that processes have mapped."""
    found = []
    for pid in pids:
        resident = processes.status(cell, pid).get("HugetlbPages", "0").split()[0]
        names = ("/anon_hugepage", "/memfd:")
        if resident != "0" or any(path.startswith(names) for path in processes.mapped_paths(cell, pid)):
            found.append(processes.smaps(cell, pid))  # takes long if there are many mappings
    return of_smaps(found)


def opened_files(cell: Cell, pids: Sequence[int]) -> set[str]:
    """Return the targets of all descriptors and mappings of the processes."""
    paths: set[str] = set()
    for pid in pids:
        paths |= set(processes.mapped_paths(cell, pid))
        paths |= {target for _, target in processes.descriptors(cell, pid)}
    return paths


def readable_path(path: str, tree: Path) -> Path:
    """Return where a file at a path in the cell can be read: files in /dev/shm are copied to the dump."""
    inside = path.removeprefix("/dev/shm/")  # noqa: S108
    return tree / "shm" / inside if inside != path else Path(path)


def mapped_files(opened: set[str]) -> list[MappedFile]:
    """Describe the files that must be present and unchanged for a restore.

    Files in the cell's /dev/shm are part of the snapshot, and deleted files are stored by CRIU.
    """
    paths = [
        path
        for path in sorted(opened)
        if path.startswith("/") and not path.startswith(("/dev/", "/proc/", "/memfd:", "/SYSV"))
    ]
    return [file for path in paths if (file := describe(path)) is not None]


def inherited_credentials(cell: Cell, root: int) -> InheritedCredentials | None:
    """Return the credentials that the root of a server's processes inherited; None if it has ended."""
    with contextlib.suppress(OSError, KeyError):
        return inherited_from(processes.host_pids_by_inner(cell)[root])
    return None


def node_of(argv: Sequence[str], environment: Mapping[str, str], running: RunningServer) -> Fingerprint:
    """Return this node, as a start of the server would find it."""
    found = Fingerprint.probe(argv, environment)
    return structs.replace(found, credentials=running.credentials or found.credentials)


def without_secrets(mapped: Sequence[MappedFile], loaded: Loaded) -> list[MappedFile]:
    """Return what to record of mapped or open files: of those that hold secrets, no digest of their own."""
    keyed = {os.path.realpath(each.path) for each in loaded.files if each.identity.startswith(sampled.KEYED)}
    return [structs.replace(each, identity="", mtime_ns=0) if each.path in keyed else each for each in mapped]
