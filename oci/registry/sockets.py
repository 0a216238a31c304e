# SPDX-License-Identifier: Apache-2.0
"""Sockets that bound how long a host can keep us waiting, also a host that sends a byte now and then.

urllib3 and http.client read header after header and chunk after chunk before they return, each with its own
timeout. These sockets count the time and the bytes of all of them together.
"""

import contextlib
import functools
import socket
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

FRAME_BYTES = 256 << 10  # of headers; and of what stands around one piece of a body in chunks
_DRIP_BYTES = 16 << 10  # a host that sends or takes less than this within the stall time has stalled
_LEAST_SECONDS = 0.1

Watch = Callable[[socket.socket], AbstractContextManager[object]]


class Pace:
    """The limit on how long a connection may keep us waiting, and for how many bytes.

    Only the time in reads and writes counts: the caller may be slow for reasons of its own.
    """

    def __init__(self, seconds: float, *, grace_seconds: float = 0.0) -> None:
        """The first bytes may take `grace_seconds` longer."""
        self._seconds = seconds
        self._left = seconds + grace_seconds
        self._bytes = 0
        self.room_bytes: int | None = FRAME_BYTES  # how much may be received yet; None: any amount

    def wait(self, sock: socket.socket, move: Callable[[], int]) -> int:
        """Call `move` and return its result, the count of bytes that it moved. Raises TimeoutError."""
        if self._left <= 0:
            if self._bytes < _DRIP_BYTES:
                raise TimeoutError(f"less than {_DRIP_BYTES} bytes in {self._seconds} s")
            self._left, self._bytes = self._seconds, 0
        sock.settimeout(self._left)
        began = time.monotonic()
        count = move()
        self._left -= time.monotonic() - began
        self._bytes += count
        return count

    def receive(self, sock: socket.socket, move: Callable[[], int]) -> int:
        """Do the same for a read. Raises ConnectionError if more comes than there is room for."""
        if self.room_bytes is None:
            return self.wait(sock, move)
        if self.room_bytes <= 0:
            raise ConnectionError("the headers, or what stands between chunks, have no end")
        count = self.wait(sock, move)
        self.room_bytes -= count
        return count


class PacedSocket(socket.socket):
    """A TCP socket whose reads and writes are bounded by a pace. By default, its timeout is the pace."""

    _pace: Pace | None = None  # ssl makes its sockets without a call of __init__

    @property
    def pace(self) -> Pace:
        if self._pace is None:
            self._pace = Pace(self.gettimeout() or _LEAST_SECONDS)
        return self._pace

    @pace.setter
    def pace(self, pace: Pace) -> None:
        self._pace = pace

    def recv(self, buflen: int = 1024, flags: int = 0) -> bytes:
        buffer = bytearray(buflen)
        count = self.recv_into(buffer, buflen, flags)
        return bytes(memoryview(buffer)[:count])

    def recv_into(self, buffer: "WriteableBuffer", nbytes: int | None = None, flags: int = 0) -> int:
        nbytes = nbytes or memoryview(buffer).nbytes
        return self.pace.receive(self, functools.partial(super().recv_into, buffer, nbytes, flags))

    def sendall(self, data: "ReadableBuffer", flags: int = 0) -> None:
        send = super().send
        with memoryview(data) as view, view.cast("B") as left:
            sent = 0
            while sent < len(left):
                sent += self.pace.wait(self, functools.partial(send, left[sent:], flags))


def dial(host: str, port: int, seconds: float, watch: Watch) -> PacedSocket:
    """Connect to the first address of a host that answers, within so many seconds for all of them.

    The socket's timeout is the rest of that time. `watch` gets each socket while it connects, and may shut
    it down to end the wait. Raises OSError.
    """
    deadline = time.monotonic() + seconds
    places = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    problem: OSError = OSError(f"{host} has no address")
    for number, (family, kind, protocol, _, place) in enumerate(places):
        with contextlib.ExitStack() as undo:
            sock = PacedSocket(family, kind, protocol)
            undo.callback(sock.close)
            try:
                with watch(sock):
                    left = deadline - time.monotonic()
                    sock.settimeout(max(_LEAST_SECONDS, left / (len(places) - number)))
                    sock.connect(place)
            except OSError as error:
                problem = error
                continue
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.settimeout(max(_LEAST_SECONDS, deadline - time.monotonic()))
            undo.pop_all()
            return sock
    raise problem


def shut(sock: socket.socket) -> None:
    """End the wait of another thread on a socket, and leave it to that thread to close it."""
    # SSLSocket.shutdown drops TLS first, and what another thread sends then would go in plain text.
    with contextlib.suppress(OSError):
        socket.socket.shutdown(sock, socket.SHUT_RDWR)
