# SPDX-License-Identifier: Apache-2.0
"""List unix sockets with their peers, which /proc/net/unix does not show.

Run as a program, it prints the sockets of its own network as JSON. Source of the format: sock_diag(7),
linux/unix_diag.h.
"""

import json
import os
import socket
import struct
import sys
from collections.abc import Iterator
from typing import TypedDict

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_REQUEST_DUMP = 0x301  # NLM_F_REQUEST | NLM_F_DUMP
_ERROR, _DONE = 2, 3
_SHOW = 0x1 | 0x4 | 0x8  # UDIAG_SHOW_NAME, UDIAG_SHOW_PEER, UDIAG_SHOW_ICONS
_NAME, _PEER, _QUEUED, _SHUTDOWN = 0, 2, 3, 6  # attributes: UNIX_DIAG_NAME, …_PEER, …_ICONS, …_SHUTDOWN
_ESTABLISHED, _BOTH_WAYS = 1, 3
_ANSWER_BYTES = 1 << 18


class UnixSocket(TypedDict):
    """A unix socket: its inode, its type, its peer's inode or 0, and its name, "@…" for an abstract one.

    `queued` are the inodes of clients whose connections a listener has not accepted. `connected` tells
    whether it is connected and not shut down both ways.
    """

    inode: int
    type: int
    peer: int
    name: str
    queued: list[int]
    connected: bool


def unix_sockets() -> list[UnixSocket]:
    """Return the unix sockets of our network. Raises OSError if the OS kernel has no unix_diag."""
    request = struct.pack("=BBHIII8x", socket.AF_UNIX, 0, 0, 0xFFFFFFFF, 0, _SHOW)
    header = struct.pack("=IHHII", 16 + len(request), _SOCK_DIAG_BY_FAMILY, _REQUEST_DUMP, 1, 0)
    found: list[UnixSocket] = []
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as sock:
        sock.settimeout(5)
        sock.send(header + request)
        while True:
            for kind, body in _split(sock.recv(_ANSWER_BYTES), "=IHHII"):
                if kind == _DONE:
                    return found
                if kind == _ERROR:
                    number = -struct.unpack_from("=i", body)[0]
                    raise OSError(number, os.strerror(number))
                found.append(_parse(body))


def _split(content: bytes, header: str) -> Iterator[tuple[int, bytes]]:
    """Yield the type and body of netlink messages, or of attributes: each begins with length and type."""
    size = struct.calcsize(header)
    while len(content) >= size:
        length, kind = struct.unpack_from(header, content)[:2]
        if not size <= length <= len(content):
            return
        yield kind, content[size:length]
        content = content[(length + 3) & ~3 :]


def _parse(body: bytes) -> UnixSocket:
    _, kind, state, _, inode = struct.unpack_from("=BBBBI", body)
    connected = state == _ESTABLISHED
    found = UnixSocket(inode=inode, type=kind, peer=0, name="", queued=[], connected=connected)
    for attribute, value in _split(body[16:], "=HH"):
        if attribute == _PEER:
            found["peer"] = struct.unpack_from("=I", value)[0]
        elif attribute == _NAME:
            name = value.rstrip(b"\0") if value[:1] != b"\0" else b"@" + value[1:]
            found["name"] = os.fsdecode(name)
        elif attribute == _SHUTDOWN and value[0] == _BOTH_WAYS:
            found["connected"] = False
        elif attribute == _QUEUED:
            found["queued"] = list(struct.unpack(f"={len(value) // 4}I", value[: len(value) // 4 * 4]))
    return found


if __name__ == "__main__":
    json.dump(unix_sockets(), sys.stdout)
