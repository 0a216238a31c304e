# SPDX-License-Identifier: Apache-2.0
"""Find the sockets that have joined a multicast group, which CRIU 4.2.1 does not save.

/proc/net/igmp and igmp6 list the groups of each interface, but not the sockets. Each socket is asked whether
it is a member, by MCAST_MSFILTER (RFC 3678).
"""

import contextlib
import ctypes
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from rekindle.cell.socket_options import duplicate
from snapshot.socket_obstacles import Finding

_MCAST_MSFILTER = 48
_LEVELS = {socket.AF_INET: socket.IPPROTO_IP, socket.AF_INET6: socket.IPPROTO_IPV6}
# Those that the OS kernel joins itself: all hosts, all nodes, and the solicited nodes of its addresses.
_OWN = ("224.0.0.1", "ff01::1", "ff02::1", "ff02::1:ff")
_libc = ctypes.CDLL(None, use_errno=True)


class Group(NamedTuple):
    """A multicast group that someone has joined on an interface."""

    family: socket.AddressFamily
    interface: int
    address: bytes

    def __str__(self) -> str:
        return socket.inet_ntop(self.family, self.address)


def joined(net: Path) -> list[Group]:
    """Return the groups that were joined in a network, given its /proc/PID/net."""
    found = [*_ipv4(_lines(net / "igmp")), *_ipv6(_lines(net / "igmp6"))]
    return [each for each in found if str(each) not in _OWN and not str(each).startswith(_OWN[-1])]


def of_membership(host_pid: int, fd: int, groups: Sequence[Group]) -> Finding | None:
    """Return a finding for a socket that is a member of one of the groups."""
    with contextlib.suppress(OSError):  # it has been closed
        process = os.pidfd_open(host_pid)
        try:
            with socket.socket(fileno=duplicate(process, fd)) as sock:
                for each in groups:
                    if sock.family == each.family and _is_member(sock, each):
                        return (
                            f"has joined the multicast group {each}, which a restored one has not",
                            "leave it",
                        )
        finally:
            os.close(process)
    return None


def _is_member(sock: socket.socket, group: Group) -> bool:
    address = struct.pack("HH", group.family, 0)
    address += bytes(4) * (group.family is socket.AF_INET6) + group.address
    wanted = struct.pack("I4x128sII", group.interface, address, 0, 0)
    buffer = ctypes.create_string_buffer(wanted, len(wanted))
    length = ctypes.c_uint32(len(wanted))
    level = _LEVELS[group.family]
    answer: int = _libc.getsockopt(sock.fileno(), level, _MCAST_MSFILTER, buffer, ctypes.byref(length))
    return answer == 0


def _lines(path: Path) -> list[str]:
    with contextlib.suppress(OSError):
        return path.read_text().splitlines()
    return []


def _ipv4(lines: Sequence[str]) -> Iterator[Group]:
    interface = 0
    for line in lines[1:]:
        if line[:1].isdigit():
            interface = int(line.split()[0])
        elif fields := line.split():
            yield Group(socket.AF_INET, interface, struct.pack("=I", int(fields[0], 16)))


def _ipv6(lines: Sequence[str]) -> Iterator[Group]:
    for fields in map(str.split, lines):
        yield Group(socket.AF_INET6, int(fields[0]), bytes.fromhex(fields[2]))
