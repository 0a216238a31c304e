# SPDX-License-Identifier: Apache-2.0
"""What /proc says about the processes of a cell. PIDs are those inside the cell."""

import contextlib
import os
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rekindle.cell import Cell


@dataclass(frozen=True, slots=True, kw_only=True)
class ListeningSocket:
    """A listening TCP socket."""

    host: str
    port: int


def proc(cell: Cell) -> Path:
    """The cell's own /proc."""
    return cell.root / "proc"


def pids(cell: Cell) -> list[int]:
    """Every process of the cell but its init."""
    return sorted(int(e.name) for e in os.scandir(proc(cell)) if e.name.isdecimal() and e.name != "1")


def status(cell: Cell, pid: int) -> dict[str, str]:
    """The fields of a process's /proc/PID/status; empty if it is gone."""
    with contextlib.suppress(OSError):
        lines = (proc(cell) / str(pid) / "status").read_text().splitlines()
        return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return {}


def children(cell: Cell, pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        path = proc(cell) / str(pid) / "task" / str(pid) / "children"
        return [int(child) for child in path.read_text().split()]
    return []


def tree(cell: Cell, root: int) -> list[int]:
    """A process and all below it, parents first."""
    found = [root]
    for pid in found:
        found += children(cell, pid)
    return found


def host_pids(cell: Cell) -> list[int]:
    """The same processes, all of them, by the PIDs that they have outside the cell."""
    found = [cell.init_pid]
    for pid in found:
        with contextlib.suppress(OSError):
            for thread in Path(f"/proc/{pid}/task").iterdir():
                found += map(int, (thread / "children").read_text().split())
    return found[1:]


def inner_pid(pid: int) -> int:
    """The PID that a process, given by that outside, has in its own namespace; 0 if it is gone."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("NSpid:"):
                return int(line.split()[-1])
    return 0


def threads(cell: Cell, pid: int) -> int:
    return int(status(cell, pid).get("Threads", "0"))


def anonymous_bytes(cell: Cell, pid: int) -> int:
    """How much of its own a process has in memory; not what it has mapped of files."""
    return int((status(cell, pid).get("RssAnon") or "0").split()[0]) * 1024


def command(cell: Cell, pid: int) -> str:
    """The command line of a process, shortened, for messages."""
    with contextlib.suppress(OSError):
        words = (proc(cell) / str(pid) / "cmdline").read_bytes().decode(errors="replace").split("\0")
        return " ".join(words).strip()[:80] or status(cell, pid).get("Name", "?")
    return "?"


def descriptors(cell: Cell, pid: int) -> Iterator[tuple[int, str]]:
    """The open files of a process: (descriptor, what the kernel calls it)."""
    directory = proc(cell) / str(pid) / "fd"
    with contextlib.suppress(OSError):
        for entry in sorted(os.scandir(directory), key=lambda e: int(e.name)):
            with contextlib.suppress(OSError):
                yield int(entry.name), str(Path(entry.path).readlink())


def mapped_paths(cell: Cell, pid: int) -> Iterator[str]:
    """What is mapped into a process, by path: files, and what the kernel names in brackets."""
    seen: set[str] = set()
    with contextlib.suppress(OSError):
        for line in (proc(cell) / str(pid) / "maps").read_text().splitlines():
            fields = line.split(maxsplit=5)
            if len(fields) == 6 and fields[5] not in seen:
                seen.add(fields[5])
                yield fields[5]


def listeners(cell: Cell) -> Iterator[ListeningSocket]:
    """The TCP sockets that listen in the cell's network."""
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{cell.init_pid}/net/{name}").read_text().splitlines()[1:]:
                local, state = line.split()[1], line.split()[3]
                if state == "0A":
                    host, port = address(local)
                    yield ListeningSocket(host=host, port=port)


def address(text: str) -> tuple[str, int]:
    """Host and port as /proc/net prints them: 32-bit words in the machine's byte order, in hexadecimal."""
    host, _, port = text.partition(":")
    words = [bytes.fromhex(host[i : i + 8]) for i in range(0, len(host), 8)]
    packed = b"".join(word[::-1] if sys.byteorder == "little" else word for word in words)
    family = socket.AF_INET6 if len(packed) == 16 else socket.AF_INET
    return socket.inet_ntop(family, packed), int(port, 16)
