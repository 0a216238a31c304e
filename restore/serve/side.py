# SPDX-License-Identifier: Apache-2.0
"""One end of a forwarded connection."""

import socket
from typing import TYPE_CHECKING

from msgspec import Struct, field

from rekindle.engine import Endpoint
from restore.serve.exchange import Exchange

if TYPE_CHECKING:
    from restore.serve.gate import ApiKeyGate
    from restore.serve.shared_port import SharedPlace


class Side(Struct, eq=False):
    """One end of a forwarded connection, with the bytes that are still to be written to it."""

    sock: socket.socket
    is_server: bool = False
    other: "Side | None" = None
    pending: bytearray = field(default_factory=bytearray)
    connected: bool = True
    read_closed: bool = False
    write_closed: bool = False
    gate: "ApiKeyGate | None" = None  # of the connection, the same for both ends
    exchange: Exchange = field(default_factory=Exchange)  # of the connection, too
    place: "SharedPlace | None" = None  # of a client at a shared port
    overlaps: bool = False  # requests of this client have met with answers
    target: Endpoint | None = None  # the address to which the server's end is connected
    parked: Endpoint | None = None  # of a server's end that is closed, and will be connected to it again

    @property
    def is_untouched(self) -> bool:
        """Whether another replica can serve this client on."""
        return self.place is not None and self.place.is_untouched and not self.read_closed

    @property
    def is_answered(self) -> bool:
        """Whether this client, as far as that is known, has got all answers, and may ask again."""
        if self.other is None or self.pending or self.other.pending or self.overlaps:
            return False
        if self.read_closed or self.other.read_closed or (self.gate and self.gate.waiting_bytes):
            return False
        return not self.exchange.is_open

    @property
    def can_be_parked(self) -> bool:
        """Whether the server's end can be replaced without its client's noticing."""
        return self.is_answered and not self.is_server and self.exchange.is_replaceable

    def stop_writing(self) -> None:
        """Write nothing more to it; what it has sent may still be read."""
        self.pending.clear()
        self.write_closed = True


def has_sent(sock: socket.socket) -> bool:
    """Return whether a readable socket has content, rather than the end of its stream."""
    try:
        return bool(sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
    except OSError:
        return False
