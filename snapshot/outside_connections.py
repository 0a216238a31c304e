# SPDX-License-Identifier: Apache-2.0
"""Find the connections of a server that lead out of it: to daemons by unix sockets, to other hosts by TCP.

CRIU dumps only both ends of a unix connection (criu/sk-unix.c), and a TCP connection would be restored for
each replica, with the same address. They are refused, or closed in the image.
"""

import contextlib
import ctypes
import json
import os
import socket
import sys
from collections.abc import Iterable, Iterator, Mapping
from enum import StrEnum
from pathlib import Path

from msgspec import Struct

from rekindle.cell import Cell, Command, Network, processes
from snapshot import unix_diag

OUTSIDE_REMEDY = (
    "snapshot with --outside close, turn off what connects to it, or start that within the server"
)
CONNECTED_STATES = {"01", "02", "03", "04", "05", "08", "09", "0B"}
"""TCP's states in /proc/net/tcp of a socket that has a peer."""

_DIAG_SECONDS = 20.0
_PIDFD_GETFD = 438  # the same number on every architecture
_libc = ctypes.CDLL(None, use_errno=True)


class Outside(StrEnum):
    """A way to treat connections to the outside."""

    REFUSE = "refuse"
    CLOSE = "close"


class Ending(StrEnum):
    """A way to close a connection: in the image alone, or by us before the dump, since CRIU would fail."""

    IN_IMAGE = "in image"
    SHUT = "shut"
    DISCONNECT = "disconnect"


class OutsideConnection(Struct, frozen=True, kw_only=True):
    """A connection that leads out of the server: `unix:PATH` or `tcp:HOST:PORT`, and what it is in words.

    If it is `dumpable`, CRIU restores it as it is: a datagram socket is connected by the name of its peer.
    """

    name: str
    what: str
    ending: Ending = Ending.IN_IMAGE
    dumpable: bool = False


def find(cell: Cell, root: int, network: Network, work: Path) -> dict[int, OutsideConnection]:
    """Return the connections of the processes below `root` that lead out of them, by the socket's inode."""
    inside = processes.socket_inodes(cell, processes.tree(cell, root))
    found = dict(_unix(cell, inside, work))
    if network is Network.HOST:
        found |= dict(_tcp(cell, root, inside))
    return found


def end_before_dump(cell: Cell, root: int, found: Mapping[int, OutsideConnection]) -> None:
    """End the connections that CRIU dumps only if they are closed.

    These are streams that no daemon has accepted, and datagram sockets, which are only disconnected.
    """
    wanted = {
        f"socket:[{inode}]": each.ending
        for inode, each in found.items()
        if each.ending is not Ending.IN_IMAGE
    }
    if not wanted:
        return
    host_pids = processes.host_pids_by_inner(cell)
    for pid in processes.tree(cell, root):
        for fd, target in processes.descriptors(cell, pid):
            if target in wanted and pid in host_pids:
                with contextlib.suppress(OSError):  # the process has closed it
                    _end(host_pids[pid], fd, wanted[target])


def _end(host_pid: int, fd: int, ending: Ending) -> None:
    pidfd = os.pidfd_open(host_pid)
    try:
        duplicate = _libc.syscall(_PIDFD_GETFD, pidfd, fd, 0)
        if duplicate < 0:
            raise OSError(ctypes.get_errno(), "pidfd_getfd")
        with socket.socket(fileno=duplicate) as sock:
            if ending is Ending.SHUT:
                sock.shutdown(socket.SHUT_RDWR)
            else:  # connect(2): an address of the family AF_UNSPEC dissolves the association
                _libc.connect(sock.fileno(), socket.AF_UNSPEC.to_bytes(2, sys.byteorder), 2)
    finally:
        os.close(pidfd)


def _unix(cell: Cell, inside: set[int], work: Path) -> Iterator[tuple[int, OutsideConnection]]:
    """Yield the unix connections that lead out, by inode.

    A peer that no process has open may be on its way to one of them. It is outside if a process outside has
    it, or else if it was accepted under a name on which no process inside listens.
    """
    listed = {each["inode"]: each for each in _unix_sockets(cell, work)}
    queued = {inode for each in listed.values() if each["inode"] in inside for inode in each["queued"]}
    listening = {listed[inode]["name"] for inode in inside & listed.keys()}
    half = {
        inode: each["peer"]
        for inode, each in listed.items()
        if inode in inside - queued
        and each["type"] != socket.SOCK_DGRAM
        and each["connected"]
        and each["peer"] not in inside
    }
    yield from _datagrams(listed, inside)
    if not half:
        return
    owners = dict(_owners(set(half.values()), without=set(processes.host_pids(cell))))
    for inode, peer in half.items():
        # A connection is made in the network of the one who connects, and so is its other end.
        name = listed[peer]["name"] if peer in listed else ""
        if not peer:
            what = "is connected to a unix socket outside of the server, which has not accepted it"
        elif peer in owners or (name and name not in listening):
            whose = f" of {owners[peer]}" if peer in owners else ""
            what = f"is connected to {name or 'a unix socket'}{whose}, outside of the server"
        else:
            continue
        ending = Ending.IN_IMAGE if peer else Ending.SHUT
        yield inode, OutsideConnection(name=f"unix:{name}", what=what, ending=ending)


def _datagrams(
    listed: Mapping[int, unix_diag.UnixSocket], inside: set[int]
) -> Iterator[tuple[int, OutsideConnection]]:
    """Yield the datagram sockets that are connected to others outside, such as a system's log.

    CRIU finds only peers in the network of the server, and connects again by their names.
    """
    found = {
        inode: each["peer"]
        for inode, each in listed.items()
        if inode in inside and each["type"] == socket.SOCK_DGRAM and each["peer"] not in {0, *inside}
    }
    names = _names_of_host() if found else {}
    for inode, peer in found.items():
        name = listed[peer]["name"] if peer in listed else names.get(peer, "")
        yield (
            inode,
            OutsideConnection(
                name=f"unix:{name}",
                what=f"is connected to {name or 'a unix socket'}, outside of the server",
                ending=Ending.DISCONNECT,
                dumpable=bool(peer in listed and name),
            ),
        )


def _names_of_host() -> dict[int, str]:
    """Return the paths of the unix sockets of our own network, by inode."""
    lines = os.fsdecode(Path("/proc/net/unix").read_bytes()).split("\n")[1:]
    rows = (line.split(maxsplit=7) for line in lines)
    return {int(fields[6]): fields[7] for fields in rows if len(fields) > 7}


def _unix_sockets(cell: Cell, work: Path) -> list[unix_diag.UnixSocket]:
    """List the unix sockets of the cell's network; empty if that cannot be asked."""
    listing = work / "unix-sockets"
    listing.unlink(missing_ok=True)
    command = Command(
        argv=[sys.executable, "-I", "-S", "-B", unix_diag.__file__],
        env={},
        cwd=Path("/"),
        files={0: Path(os.devnull), 1: listing, 2: Path(os.devnull)},
    )
    if cell.run(command, _DIAG_SECONDS) != 0:
        return []
    found: list[unix_diag.UnixSocket] = json.loads(listing.read_bytes())
    return found


def _owners(inodes: set[int], *, without: set[int]) -> Iterator[tuple[int, str]]:
    """Yield the sockets that processes of the host have open, each with a process: name and PID."""
    wanted = {f"socket:[{inode}]": inode for inode in inodes}
    for process in Path("/proc").iterdir():
        if process.name.isdecimal() and int(process.name) not in without:
            with contextlib.suppress(OSError):
                for entry in os.scandir(process / "fd"):
                    with contextlib.suppress(OSError):
                        if inode := wanted.get(str(Path(entry.path).readlink())):
                            yield inode, f"{(process / 'comm').read_text().strip()} (PID {process.name})"


def _tcp(cell: Cell, root: int, inside: set[int]) -> Iterator[tuple[int, OutsideConnection]]:
    """Yield the TCP connections of the host's network that lead out.

    A connection between addresses of this host is within the server unless another process has its other
    end; one that nobody has open any more leads nowhere.
    """
    rows = list(_connected(cell, root))
    ends = {(here, there): inode for here, there, inode in rows}
    for here, there, inode in rows:
        if inode not in inside:
            continue
        peer = ends.get((there, here))
        if (peer is None and here[0] != there[0]) or (peer and peer not in inside):
            name = f"[{there[0]}]:{there[1]}" if ":" in there[0] else f"{there[0]}:{there[1]}"
            what = f"is connected to {there[0]} port {there[1]}, outside of the server"
            yield inode, OutsideConnection(name=f"tcp:{name}", what=what)


Address = tuple[str, int]


def _connected(cell: Cell, root: int) -> Iterable[tuple[Address, Address, int]]:
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            lines = (processes.proc(cell) / str(root) / "net" / table).read_text().splitlines()[1:]
            for fields in map(str.split, lines):
                if fields[3] in CONNECTED_STATES:
                    yield _address(fields[1]), _address(fields[2]), int(fields[9])


def _address(text: str) -> Address:
    host, port = processes.address(text)
    return host.removeprefix("::ffff:"), port  # IPv4 in a socket for IPv6
