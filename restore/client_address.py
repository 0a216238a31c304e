# SPDX-License-Identifier: Apache-2.0
"""The ways in which a server behind us learns its clients' addresses.

The PROXY protocol is that of HAProxy, proxy-protocol.txt: a header before the first byte of a connection.
"""

import socket
import struct
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ipaddress import IPv4Address, IPv6Address

_V2_SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
_V2_PROXY = 0x21  # version 2, command PROXY
_V2_LOCAL = 0x20
_TCP4, _TCP6 = 0x11, 0x21


class ClientAddress(StrEnum):
    """`proxy-v1` and `proxy-v2`: the PROXY protocol; `forwarded-for`: X-Forwarded-For in each request."""

    PROXY_V1 = "proxy-v1"
    PROXY_V2 = "proxy-v2"
    FORWARDED_FOR = "forwarded-for"


def peer(client: socket.socket) -> str:
    """Return the IP address of a connected client, or "unknown" if it has gone already."""
    try:
        return str(_ip(client.getpeername()[0]))
    except OSError:
        return "unknown"


def proxy_header(kind: ClientAddress, client: socket.socket) -> bytes:
    """Return the header of the PROXY protocol for the connection of a client; b"" if there is none."""
    try:
        source, target = client.getpeername(), client.getsockname()
    except OSError:  # it has gone already
        return {
            ClientAddress.PROXY_V1: b"PROXY UNKNOWN\r\n",
            ClientAddress.PROXY_V2: _V2_SIGNATURE + struct.pack("!BBH", _V2_LOCAL, 0, 0),
        }.get(kind, b"")
    here, there = _ip(source[0]), _ip(target[0])
    if kind is ClientAddress.PROXY_V1:
        return f"PROXY TCP{here.version} {here} {there} {source[1]} {target[1]}\r\n".encode()
    if kind is ClientAddress.PROXY_V2:
        addresses = here.packed + there.packed + struct.pack("!HH", source[1], target[1])
        family = _TCP4 if here.version == 4 else _TCP6
        return _V2_SIGNATURE + struct.pack("!BBH", _V2_PROXY, family, len(addresses)) + addresses
    return b""


def _ip(text: str) -> "IPv4Address | IPv6Address":
    """Parse an address; one of IPv4 at a socket of both families is of IPv4."""
    import ipaddress  # rarely needed

    found = ipaddress.ip_address(text.partition("%")[0])
    return getattr(found, "ipv4_mapped", None) or found
