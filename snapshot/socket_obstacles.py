# SPDX-License-Identifier: Apache-2.0
"""Find the sockets that CRIU cannot dump.

The rules follow CRIU 4.2.1: `criu/sockets.c` (families), `criu/sk-inet.c`, `criu/sk-unix.c`,
`criu/sk-netlink.c`.
"""

import contextlib
import json
import os
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from rekindle.cell import Cell, Command, Network, processes
from snapshot import unix_diag
from snapshot.private_paths import PrivatePaths, socket_paths

Finding = tuple[str, str]
"""What is wrong, and the remedy."""

_DIAG_SECONDS = 20.0
# The tables of /proc/net, and the column of the socket's inode.
_TABLES = {
    **dict.fromkeys(("tcp", "tcp6", "udp", "udp6", "udplite", "udplite6", "raw", "raw6"), 9),
    "unix": 6,
    "netlink": 9,
    "packet": 8,
}
# The names of protocols that CRIU knows, as the OS kernel gives them in an extended attribute of a socket.
_KNOWN_PROTOCOLS = {
    *("TCP", "TCPv6", "UDP", "UDPv6", "UDP-Lite", "UDPLITEv6", "RAW", "RAWv6"),
    *("UNIX", "UNIX-STREAM", "NETLINK", "PACKET"),
}
_CONNECTED_STATES = {"01", "02", "03", "04", "05", "08", "09", "0B"}
_SEND_QUEUE_BYTES = 1 << 20  # more than a restored socket takes back at once
_MPTCP_REMEDY = "turn it off; Go programs do with GODEBUG=multipathtcp=0"
_PLACES = "put it below $TMPDIR, or into a directory that the server makes"
_UNREAD = ("has messages that were not read", "read them, or snapshot again")


class Sockets:
    """The sockets of a cell's network, and what CRIU cannot dump of them."""

    def __init__(self, cell: Cell, root: int, network: Network, private: PrivatePaths, work: Path) -> None:
        self._listed = _listed(cell, root, network, private)
        self._outside = _outside(cell, root, work)

    def finding(self, link: Path, inode: int) -> Finding | None:
        """Return what is wrong with a socket, given its link in /proc/PID/fd; None if nothing is.

        The tables of /proc/net list no TCP or UDP socket that is not connected or bound, or whose connection
        was reset; CRIU can dump those.
        """
        return _of_protocol(link) or self._outside.get(inode) or self._listed.get(inode)


def _of_protocol(link: Path) -> Finding | None:
    with contextlib.suppress(OSError):  # the process has closed it
        name = os.getxattr(link, "system.sockprotoname").rstrip(b"\0").decode()
        if name.startswith("MPTCP"):
            return "is a socket for Multipath TCP, which CRIU does not know", _MPTCP_REMEDY
        if name not in _KNOWN_PROTOCOLS:
            return f"is a socket of a family unknown to CRIU ({name})", "close it"
    return None


def _listed(cell: Cell, root: int, network: Network, private: PrivatePaths) -> dict[int, Finding]:
    """Return the findings about sockets in the tables of /proc/net, by inode."""
    found: dict[int, Finding] = {}
    pids = processes.tree(cell, root)
    for table, column in _TABLES.items():
        with contextlib.suppress(OSError):
            lines = (processes.proc(cell) / str(root) / "net" / table).read_text().splitlines()[1:]
            for fields in (line.split(maxsplit=column + 1) for line in lines):
                if len(fields) <= column:
                    continue
                if table == "unix" and len(fields) > 7:
                    places = list(socket_paths(cell, fields[7], pids))
                    if places and all(private.holds(place) for place in places):
                        continue
                if finding := _of_row(table, fields, network):
                    found[int(fields[column])] = finding
    return found


def _of_row(table: str, fields: Sequence[str], network: Network) -> Finding | None:
    if table == "unix":
        return _of_unix_path(fields[7]) if len(fields) > 7 else None
    if table == "netlink":
        return _UNREAD if int(fields[4]) else None
    if table.startswith("tcp"):
        return (_of_connection(fields) if network is Network.HOST else None) or _of_queue(fields)
    return None


def _of_unix_path(path: str) -> Finding | None:
    if path.startswith(("@", "/dev/shm/")):  # noqa: S108 - both are private to the cell
        return None
    return f"is bound to {path}, which replicas would take from each other", _PLACES


def _of_connection(fields: Sequence[str]) -> Finding | None:
    (here, _), (there, port) = processes.address(fields[1]), processes.address(fields[2])
    if fields[3] not in _CONNECTED_STATES or here == there:
        return None
    return f"is connected to {there} port {port}, which is lost after a restore", "close the connection"


def _of_queue(fields: Sequence[str]) -> Finding | None:
    waiting = int(fields[4].partition(":")[0], 16)
    if fields[3] not in _CONNECTED_STATES or waiting < _SEND_QUEUE_BYTES:
        return None
    return f"has {waiting:,} bytes that its peer does not read", "let the peer read them, or close it"


def _outside(cell: Cell, root: int, work: Path) -> dict[int, Finding]:
    """Return the unix connections that lead out of the cell, by inode. CRIU dumps only both ends.

    A peer that no process has open may be on its way to one of them. It is outside if a process outside has
    it, or else if it was accepted under a name on which no process inside listens.
    """
    inside = processes.socket_inodes(cell, processes.tree(cell, root))
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
    if not half:
        return {}
    owners = dict(_owners(set(half.values()), without=set(processes.host_pids(cell))))
    found = {}
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
        found[inode] = what, "turn off what connects to it, or start that within the server"
    return found


def _unix_sockets(cell: Cell, work: Path) -> list[unix_diag.UnixSocket]:
    """List the unix sockets of the cell's network; empty if that cannot be asked."""
    listing = work / "unix-sockets"
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
