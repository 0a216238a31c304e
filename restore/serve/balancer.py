# SPDX-License-Identifier: Apache-2.0
"""Hand the connections of a published port to the replica that has the fewest: docs/adr/0036-shared-port.md.

A process of its own, started by the first replica at a port, which ends with the last one. It is nobody's
child, and runs without the rest of rekindle:

    python balancer.py LISTENER CONTROL early|ready

LISTENER is the bound socket of the port, CONTROL the socket `socket` of the directory that is its working
directory, which replicas connect to. They talk in messages over SOCK_SEQPACKET; N is a slot, 4 bytes:

    from a replica                            from the balancer
    J, with a file  join; its table           L, with LISTENER   in case that the balancer is killed
    R               send connections          CN, with a socket  a client's connection
    H               send no more
    DN              the connection has ended
    GN              give it to another replica

The balancer keeps a descriptor of each connection until that has ended. The table has a byte for each slot:
what has come of the connection. If the replica is killed, those on which nothing is asked go to another one.
"""

import collections
import contextlib
import fcntl
import mmap
import os
import selectors
import signal
import socket
import struct
import sys
import time

SLOTS = 1 << 16
NEW, ASKED, IDLE = 0, 1, 2
"""Nothing was read from it; it waits for an answer or may do so; each request was answered."""

JOIN, READY, HOLD, DONE, GIVE_BACK = b"J", b"R", b"H", b"D", b"G"
LISTENER, CONNECTION = b"L", b"C"
MESSAGE_BYTES = 5
SOCKET, LOCK = "socket", "lock"

BACKLOG = 1024
_ACCEPTS = 64  # in a row, before others are heard
_FIRST_SECONDS = 10.0
_RETRY_SECONDS = 0.02
_TRIES = 250  # so five seconds, for a server that has ended without its replica knowing yet
_UNREAD_BYTES = 1 << 16


class _Waiting:
    """A client that a replica has given back."""

    def __init__(self, sock: socket.socket, tries: int) -> None:
        self.sock, self.tries = sock, tries
        self.due = time.monotonic() + (_RETRY_SECONDS if tries > 1 else 0.0)


class _Sharer:
    """A replica: its connections by slot, with how often each was given back."""

    def __init__(self, link: socket.socket) -> None:
        self.link = link
        self.table: mmap.mmap | None = None
        self.is_ready = False
        self.served = 0
        self.connections: dict[int, tuple[socket.socket, int]] = {}
        self._free: collections.deque[int] = collections.deque()
        self._used = 0

    def hand(self, client: socket.socket, tries: int) -> bool:
        """Hand it a connection; return whether it takes that."""
        if not self._free and self._used < SLOTS:
            self._free.append(self._used)
            self._used += 1
        if not self._free or self.table is None:
            return False
        slot = self._free.popleft()
        self.table[slot] = NEW
        try:
            socket.send_fds(self.link, [CONNECTION + struct.pack("<I", slot)], [client.fileno()])
        except OSError:  # it is full, or gone
            self._free.append(slot)
            return False
        self.connections[slot] = (client, tries)
        self.served += 1
        return True

    def take(self, slot: int) -> tuple[socket.socket, int]:
        found = self.connections.pop(slot)
        self._free.append(slot)
        return found


class Balancer:
    """The state of the process."""

    def __init__(self, listener: socket.socket, control: socket.socket, *, is_early: bool) -> None:
        self._listener, self._control = listener, control
        self._selector = selectors.DefaultSelector()
        self._members: set[_Sharer] = set()
        self._waiting: list[_Waiting] = []
        self._accepts = False
        listener.setblocking(False)
        control.setblocking(False)
        self._selector.register(control, selectors.EVENT_READ, self._admit)
        if is_early:
            listener.listen(BACKLOG)

    def run(self) -> None:
        """Serve until no replica is left."""
        self._selector.select(_FIRST_SECONDS)
        while self._members or not self._is_over():
            for key, _ in self._selector.select(_RETRY_SECONDS if self._waiting else None):
                key.data()
            self._retry()
            self._watch()
        for each in self._waiting:
            each.sock.close()
        with contextlib.suppress(OSError):
            turn_away(self._listener)

    def _is_over(self) -> bool:
        """Return whether no other replica has come, and close the socket by which it would."""
        with open(LOCK, "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._admit()
            if self._members:
                return False
            with contextlib.suppress(FileNotFoundError):
                os.unlink(SOCKET)  # noqa: PTH108 - pathlib takes long to import
            return True

    def _admit(self) -> None:
        """Accept a replica, if there is one."""
        try:
            link, _ = self._control.accept()
        except OSError:
            return
        link.setblocking(False)
        member = _Sharer(link)
        self._members.add(member)
        self._selector.register(link, selectors.EVENT_READ, lambda: self._hear(member))
        with contextlib.suppress(OSError):
            socket.send_fds(link, [LISTENER], [self._listener.fileno()])

    def _hear(self, member: _Sharer) -> None:
        """Take what a replica says."""
        try:
            message, fd = receive(member.link)
        except BlockingIOError:
            return
        except OSError:
            message, fd = b"", None
        op, rest = message[:1], message[1:]
        if op == JOIN and fd is not None:
            member.table = mmap.mmap(fd, SLOTS)
            os.close(fd)
        elif op == READY:
            with contextlib.suppress(OSError):  # it listens already
                self._listener.listen(BACKLOG)
            member.is_ready = True
        elif op == HOLD:
            member.is_ready = False
        elif op in {DONE, GIVE_BACK} and len(rest) == 4:
            slot = struct.unpack("<I", rest)[0]
            client, tries = member.take(slot)
            if op == DONE:
                client.close()
            else:
                was_served = member.table is not None and member.table[slot] == IDLE
                self._place(client, 1 if was_served else tries + 1)
        else:
            self._lose(member)

    def _lose(self, member: _Sharer) -> None:
        """Give what a replica that has ended leaves behind to others, but for what it was asked."""
        self._members.discard(member)
        self._selector.unregister(member.link)
        member.link.close()
        for slot, (client, _) in member.connections.items():
            if member.table is None or member.table[slot] == ASKED:
                with contextlib.suppress(OSError):
                    client.shutdown(socket.SHUT_RDWR)
                client.close()
            else:
                self._place(client, 1)

    def _place(self, client: socket.socket, tries: int) -> None:
        """Give a connection to the replica with the fewest; if none takes it, it waits."""
        if tries > _TRIES:
            client.close()
        elif tries > 1 or not self._hand(client, tries):
            self._waiting.append(_Waiting(client, tries))

    def _hand(self, client: socket.socket, tries: int) -> bool:
        ready = [member for member in self._members if member.is_ready]
        ready.sort(key=lambda member: (len(member.connections), member.served))
        return any(member.hand(client, tries) for member in ready)

    def _retry(self) -> None:
        now, waiting = time.monotonic(), self._waiting
        self._waiting = []
        for each in waiting:
            if each.due > now or not self._hand(each.sock, each.tries):
                self._waiting.append(each)

    def _watch(self) -> None:
        """Accept connections only while a replica takes them: they wait in the queue until then."""
        wants = any(member.is_ready for member in self._members)
        if wants and not self._accepts:
            self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        elif self._accepts and not wants:
            self._selector.unregister(self._listener)
        self._accepts = wants

    def _accept(self) -> None:
        for _ in range(_ACCEPTS):
            try:
                client, _address = self._listener.accept()
            except BlockingIOError:
                return
            except OSError:
                time.sleep(_RETRY_SECONDS)  # no descriptor is left, and the connection would wake us at once
                return
            self._place(client, 0)


def receive(link: socket.socket) -> tuple[bytes, int | None]:
    """Receive a message, and the descriptor that came with it. Raises BlockingIOError if there is none."""
    # Not socket.recv_fds, which ignores flags (Python 3.11).
    flags = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
    message, found, _, _ = link.recvmsg(MESSAGE_BYTES, socket.CMSG_LEN(4), flags)
    return message, next((struct.unpack("i", content)[0] for _, _, content in found), None)


def turn_away(sock: socket.socket) -> None:
    """Close the connections that wait at a listening socket, so that clients see an end rather than an error.

    The OS kernel would reset them, as it does a connection that is closed with something unread.
    """
    sock.setblocking(False)
    with contextlib.suppress(OSError):
        while True:
            client, _ = sock.accept()
            with client, contextlib.suppress(OSError):
                client.setblocking(False)
                client.shutdown(socket.SHUT_WR)
                while client.recv(_UNREAD_BYTES):
                    pass


def main(words: list[str]) -> None:
    """Run the process."""
    import resource

    if os.fork():
        os._exit(0)
    listener, control, start = words
    for signum in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(signum, signal.SIG_IGN)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    published, joined = socket.socket(fileno=int(listener)), socket.socket(fileno=int(control))
    Balancer(published, joined, is_early=start == "early").run()


if __name__ == "__main__":
    main(sys.argv[1:])
