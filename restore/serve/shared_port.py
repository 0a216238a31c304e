# SPDX-License-Identifier: Apache-2.0
"""A published port that several replicas share, as one of them sees it.

    $REKINDLE_HOME/ports/HOST-PORT/
        socket      of the balancer, which accepts the connections: restore/serve/balancer.py
        lock        held while a replica looks for the balancer, or starts one

If the balancer is killed, the replicas start another one with the same listening socket, so the port stays
open and what waits in its queue is served.
"""

import contextlib
import mmap
import os
import re
import select
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from rekindle.engine import Endpoint
from rekindle.files import locked
from rekindle.run import spawn
from restore.serve import balancer
from restore.serve.balancer import ASKED, IDLE, NEW

_ANSWER_SECONDS = 5.0

Bind = Callable[[], socket.socket]


class SharedPlace:
    """The place of a client's connection at a shared port."""

    __slots__ = ("_link", "_slot", "_table")

    def __init__(self, link: "_Link", slot: int) -> None:
        self._link, self._table, self._slot = link, link.table, slot

    @property
    def is_untouched(self) -> bool:
        """Whether nothing was read from the client, or nothing since its last answer."""
        return self._table[self._slot] in {NEW, IDLE}

    def asked(self) -> None:
        """Note that something is going to be read from the client."""
        self._table[self._slot] = ASKED

    def idle(self) -> None:
        """Note that the client has got its answer."""
        self._table[self._slot] = IDLE

    def done(self) -> None:
        """Let the balancer forget the connection, which has ended."""
        self._link.say(balancer.DONE, self._slot)

    def give_back(self) -> None:
        """Let another replica have the connection."""
        self._link.say(balancer.GIVE_BACK, self._slot)


class _Link:
    """A connection to a balancer."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        memory = os.memfd_create("connections")
        try:
            os.ftruncate(memory, balancer.SLOTS)
            self.table = mmap.mmap(memory, balancer.SLOTS)
            with contextlib.suppress(OSError):
                socket.send_fds(sock, [balancer.JOIN], [memory])
        finally:
            os.close(memory)

    def say(self, op: bytes, slot: int | None = None) -> None:
        """Tell the balancer something; whether it has been killed shows when it is listened to."""
        with contextlib.suppress(OSError):
            self.sock.send(op + (b"" if slot is None else struct.pack("<I", slot)))

    def close(self) -> None:
        self.sock.close()


class SharedPort:
    """The place of a replica at a port. Closing it hands its clients to the others."""

    def __init__(self, directory: Path, at: Endpoint, bound: Bind, *, is_early: bool) -> None:
        """Join the replicas at the port, as the first of them if `bound` can bind the address.

        With `is_early`, clients may connect before any replica is ready, and wait. Raises what `bound` does.
        """
        self._directory, self._is_early = directory / _name(at), is_early
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._listener: socket.socket | None = None
        self._is_ready = False
        self._link = self._join(bound)

    def fileno(self) -> int:
        return self._link.sock.fileno()

    def ready(self) -> None:
        """Ask for connections. The port is open when this returns."""
        self._is_ready = True
        deadline = time.monotonic() + _ANSWER_SECONDS
        while self._listener is None and time.monotonic() < deadline:
            select.select([self._link.sock], [], [], _ANSWER_SECONDS)
            with contextlib.suppress(OSError):
                self.take()  # no connection yet: it has not asked for any
        if self._listener is not None:
            self._listener.listen(balancer.BACKLOG)
        self._link.say(balancer.READY)

    def hold(self) -> None:
        """Ask for no more connections."""
        self._is_ready = False
        self._link.say(balancer.HOLD)

    def take(self) -> tuple[socket.socket, SharedPlace] | None:
        """Take a connection; None if what has come is none.

        Raises BlockingIOError if nothing has come, and ConnectionError if the balancer has been killed.
        """
        message, fd = balancer.receive(self._link.sock)
        if not message:
            raise ConnectionResetError
        if fd is None:
            return None
        sock = socket.socket(fileno=fd)
        if message[:1] == balancer.CONNECTION:
            return sock, SharedPlace(self._link, struct.unpack("<I", message[1:])[0])
        if self._listener is not None:
            self._listener.close()
        self._listener = sock
        return None

    def rejoin(self) -> None:
        """Find the balancer again, or start another. Raises OSError or RekindleError."""
        self._link.close()
        self._link = self._join(self._adopt)
        if self._is_ready:
            self.ready()

    def close(self) -> None:
        """Leave. Idempotent."""
        self._link.close()
        if self._listener is not None:
            self._listener.close()

    def _adopt(self) -> socket.socket:
        if self._listener is None:
            raise ConnectionResetError("the balancer has ended before it was there")
        return self._listener.dup()

    def _join(self, bound: Bind) -> _Link:
        with _inside(self._directory) as inside, locked(self._directory / balancer.LOCK):
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            try:
                try:
                    sock.connect(inside)
                except OSError:
                    with bound() as listener:
                        self._start(listener, inside)
                    sock.connect(inside)
            except BaseException:
                sock.close()
                raise
            return _Link(sock)

    def _start(self, listener: socket.socket, inside: str) -> None:
        """Start a balancer, which can be connected to at once."""
        (self._directory / balancer.SOCKET).unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as control:
            control.bind(inside)
            control.listen()
            fds = [listener.fileno(), control.fileno()]
            spawn(
                [
                    *(sys.executable, "-I", "-S", "-B", balancer.__file__),
                    *map(str, fds),
                    "early" if self._is_early else "ready",
                ],
                env={"PATH": os.defpath},
                cwd=self._directory,
                pass_fds=fds,
            ).wait(_ANSWER_SECONDS)  # it goes on in a child


def _name(at: Endpoint) -> str:
    return f"{re.sub(r'[^0-9A-Za-z.:-]', '_', at.host)}-{at.port}"


@contextlib.contextmanager
def _inside(directory: Path) -> Iterator[str]:
    """Yield a path of the socket that is short enough for an address, which has at most 107 bytes."""
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{balancer.SOCKET}"
    finally:
        os.close(fd)
