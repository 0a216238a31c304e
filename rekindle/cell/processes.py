# SPDX-License-Identifier: Apache-2.0
"""Read /proc about the processes of a cell. PIDs are those inside the cell unless a name says otherwise."""

import contextlib
import os
import socket
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from msgspec import Struct

from rekindle import proc as proc_facts
from rekindle.cell import Cell, descendants
from rekindle.proc import children


class ListeningSocket(Struct, frozen=True, kw_only=True):
    """A listening TCP socket, with its inode."""

    host: str
    port: int
    inode: int


def proc(cell: Cell) -> Path:
    """Return the path of the cell's own /proc."""
    return cell.root / "proc"


def pids(cell: Cell) -> list[int]:
    """List every process of the cell except its init."""
    if cell.only is not None:
        return sorted(tree(cell, cell.only))
    return sorted(int(e.name) for e in os.scandir(proc(cell)) if e.name.isdecimal() and e.name != "1")


def status(cell: Cell, pid: int) -> dict[str, str]:
    """Return the fields of /proc/PID/status; empty if the process is gone."""
    with contextlib.suppress(OSError):
        lines = (proc(cell) / str(pid) / "status").read_text().splitlines()
        return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return {}


def environment(cell: Cell, pid: int) -> dict[str, str]:
    """Return the variables that a process was started with. Raises OSError."""
    variables = (proc(cell) / str(pid) / "environ").read_bytes().split(b"\0")[:-1]
    pairs = (os.fsdecode(each).partition("=") for each in variables)
    return {name: value for name, _, value in pairs}


def runs(cell: Cell, pid: int) -> bool:
    """Tell whether there is a process with this PID that has not been reaped."""
    return (proc(cell) / str(pid)).exists()


def tree(cell: Cell, root: int) -> list[int]:
    """List a process and all its descendants, parents first."""
    found = [root]
    for pid in found:
        found += children(proc(cell) / str(pid))
    return found


def strays(cell: Cell, root: int, *, patience: float = 1.0) -> set[int]:
    """Return the processes of the cell that are not `root` or its descendants.

    One that starts or ends meanwhile is none: a process is a stray if it is one for `patience` seconds.
    """
    deadline = time.monotonic() + patience
    found = set(pids(cell)) - set(tree(cell, root))
    while found and time.monotonic() < deadline:
        time.sleep(0.02)
        found &= set(pids(cell)) - set(tree(cell, root))
    return found


def host_pids(cell: Cell) -> list[int]:
    """List the PIDs on the host of every process of the cell except its init."""
    own = [] if cell.only is None else [cell.only]
    return own + descendants.of(cell.init_pid)


def host_pids_by_inner(cell: Cell) -> dict[int, int]:
    """Return the PIDs on the host of every process of the cell except its init, by its PID in the cell."""
    return {descendants.inner_pid(pid): pid for pid in host_pids(cell)}


def task_ids(cell: Cell, pid: int) -> list[int]:
    """List the threads of a process."""
    with contextlib.suppress(OSError):
        return [int(entry.name) for entry in os.scandir(proc(cell) / str(pid) / "task")]
    return []


def threads(cell: Cell, pid: int) -> int:
    return int(status(cell, pid).get("Threads", "0"))


def anonymous_bytes(cell: Cell, pid: int) -> int:
    """Return the size of a process's resident anonymous memory; mapped files do not count."""
    return int((status(cell, pid).get("RssAnon") or "0").split()[0]) * 1024


def command(cell: Cell, pid: int) -> str:
    """Return the command line of a process, shortened for messages."""
    with contextlib.suppress(OSError):
        words = (proc(cell) / str(pid) / "cmdline").read_bytes().decode(errors="replace").split("\0")
        return " ".join(words).strip()[:80] or status(cell, pid).get("Name", "?")
    return "?"


def descriptors(cell: Cell, pid: int) -> Iterator[tuple[int, str]]:
    """List the open files of a process as (descriptor, target of the link in /proc/PID/fd)."""
    directory = proc(cell) / str(pid) / "fd"
    with contextlib.suppress(OSError):
        for entry in sorted(os.scandir(directory), key=lambda e: int(e.name)):
            with contextlib.suppress(OSError):
                yield int(entry.name), str(Path(entry.path).readlink())


def _maps(cell: Cell, pid: int) -> list[str]:
    text = os.fsdecode((proc(cell) / str(pid) / "maps").read_bytes())
    return text.rstrip("\n").split("\n")  # other ends of lines may be in names


def mapped_paths(cell: Cell, pid: int) -> Iterator[str]:
    """List the paths mapped into a process, each once, with the OS kernel's names in brackets."""
    seen: set[str] = set()
    with contextlib.suppress(OSError):
        for line in _maps(cell, pid):
            fields = line.split(maxsplit=5)
            if len(fields) == 6 and fields[5] not in seen:
                seen.add(fields[5])
                yield fields[5]


def smaps(cell: Cell, pid: int) -> str:
    """Return /proc/PID/smaps, which lists the mappings of a process in detail; "" if it is gone."""
    with contextlib.suppress(OSError):
        return (proc(cell) / str(pid) / "smaps").read_text(errors="replace")
    return ""


def socket_inodes(cell: Cell, pids: Iterable[int]) -> set[int]:
    """Return the inodes of the sockets that processes have open."""
    return {
        int(target[8:-1])
        for pid in pids
        for _, target in descriptors(cell, pid)
        if target.startswith("socket:[")
    }


def written_mappings(cell: Cell, pid: int) -> Iterator[str]:
    """List the paths of the files that a process writes to by shared mappings."""
    with contextlib.suppress(OSError):
        for line in _maps(cell, pid):
            fields = line.split(maxsplit=5)
            if len(fields) == 6 and fields[1].startswith("rw") and fields[1].endswith("s"):
                yield fields[5]


def listeners(cell: Cell) -> Iterator[ListeningSocket]:
    """List the listening TCP sockets of the cell's network."""
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{cell.init_pid}/net/{name}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A":
                    host, port = address(fields[1])
                    yield ListeningSocket(host=host, port=port, inode=int(fields[9]))


def address(text: str) -> tuple[str, int]:
    """Parse host and port as /proc/net prints them: hexadecimal 32-bit words in native byte order."""
    host, _, port = text.partition(":")
    words = [bytes.fromhex(host[i : i + 8]) for i in range(0, len(host), 8)]
    packed = b"".join(word[::-1] if sys.byteorder == "little" else word for word in words)
    family = socket.AF_INET6 if len(packed) == 16 else socket.AF_INET
    return socket.inet_ntop(family, packed), int(port, 16)


def memory_bytes(cell: Cell) -> tuple[int, int]:
    """Return the bytes of a cell's anonymous and shared memory, and of its mapped files in memory."""
    return proc_facts.memory_bytes(host_pids(cell))
