# SPDX-License-Identifier: Apache-2.0
"""Find the sockets that CRIU cannot dump.

The rules follow CRIU 4.2.1: `criu/sockets.c` (families), `criu/sk-inet.c`, `criu/sk-unix.c`,
`criu/sk-netlink.c`.
"""

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from rekindle.cell import Cell, processes
from snapshot.outside_connections import CONNECTED_STATES, OUTSIDE_REMEDY, OutsideConnection
from snapshot.private_paths import PrivatePaths, socket_paths

Finding = tuple[str, str]
"""A problem, and its remedy."""

# The tables of /proc/net, and the column of the socket's inode.
_TABLES = {
    **dict.fromkeys(("tcp", "tcp6", "udp", "udp6", "udplite", "udplite6", "raw", "raw6"), 9),
    "unix": 6,
    "netlink": 9,
    "packet": 8,
}
# Families and protocols that CRIU does not know: how the names begin that the OS kernel gives them, in an
# extended attribute of a socket.
_UNKNOWN_PROTOCOLS = (
    *(
        "AF_VSOCK",
        "ALG",
        "XDP",
        "TIPC",
        "SMC",
        "SCTP",
        "DCCP",
        "L2TP",
        "KCM",
        "CAN",
        "QIPCRTR",
        "RDS",
        "AF_RXRPC",
    ),
    *("HCI", "L2CAP", "RFCOMM", "SCO", "PPP", "NFC"),
)
_SEND_QUEUE_BYTES = 1 << 20  # more than a restored socket takes back at once
_MPTCP_REMEDY = "turn it off; Go programs do with GODEBUG=multipathtcp=0"
_PLACES = "put it below $TMPDIR, or into a directory that the server makes"
_UNREAD = ("has messages that were not read", "read them, or snapshot again")


class Sockets:
    """The sockets of a cell's network, and what CRIU cannot dump of them."""

    def __init__(
        self, cell: Cell, root: int, private: PrivatePaths, outside: Mapping[int, OutsideConnection]
    ) -> None:
        """Know what replicas do not share, and the connections to the outside that cannot be dumped."""
        self._listed = _listed(cell, root, private)
        self._outside = outside

    def finding(self, link: Path, inode: int) -> Finding | None:
        """Return what is wrong with a socket, given its link in /proc/PID/fd; None if nothing is.

        The tables of /proc/net list no TCP or UDP socket that is not connected or bound, or whose connection
        was reset; CRIU can dump those.
        """
        if found := _of_protocol(link):
            return found
        if inode in self._outside:
            return self._outside[inode].what, OUTSIDE_REMEDY
        return self._listed.get(inode)


def _of_protocol(link: Path) -> Finding | None:
    with contextlib.suppress(OSError):  # the process has closed it
        name = os.getxattr(link, "system.sockprotoname").rstrip(b"\0").decode()
        if name.startswith("MPTCP"):
            return "is a socket for Multipath TCP, which CRIU does not know", _MPTCP_REMEDY
        if name.startswith(_UNKNOWN_PROTOCOLS):
            return f"is a socket of a family unknown to CRIU ({name})", "close it"
    return None


def _listed(cell: Cell, root: int, private: PrivatePaths) -> dict[int, Finding]:
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
                if finding := _of_row(table, fields):
                    found[int(fields[column])] = finding
    return found


def _of_row(table: str, fields: Sequence[str]) -> Finding | None:
    if table == "unix":
        return _of_unix_path(fields[7]) if len(fields) > 7 else None
    if table == "netlink":
        return _UNREAD if int(fields[4]) else None
    if table.startswith("tcp"):
        return _of_queue(fields)
    return None


def _of_unix_path(path: str) -> Finding | None:
    if path.startswith(("@", "/dev/shm/")):  # noqa: S108 - both are private to the cell
        return None
    return f"is bound to {path}, which replicas would take from each other", _PLACES


def _of_queue(fields: Sequence[str]) -> Finding | None:
    waiting = int(fields[4].partition(":")[0], 16)
    if fields[3] not in CONNECTED_STATES or waiting < _SEND_QUEUE_BYTES:
        return None
    return f"has {waiting:,} bytes that its peer does not read", "let the peer read them, or close it"
