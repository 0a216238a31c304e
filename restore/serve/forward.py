# SPDX-License-Identifier: Apache-2.0
"""Forward connections from published addresses of the host to the server."""

import contextlib
import errno
import functools
import os
import select
import selectors
import socket
import time
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from rekindle.engine import Endpoint
from rekindle.errors import RekindleError
from restore.client_address import ClientAddress, peer, proxy_header
from restore.serve.side import Side, has_sent

if TYPE_CHECKING:
    from restore.serve.gate import ApiKeyGate, NewGate
    from restore.serve.shared_port import SharedPlace, SharedPort

_BUFFER_BYTES = 256 * 1024
_PAUSE_SECONDS = 0.01
_DRAIN_SECONDS = 2.0
_REJOINS = 100


def _rejoin(port: "SharedPort") -> bool:
    """Find the balancer of a port again, or start another; return whether there is one."""
    for _ in range(_REJOINS):
        with contextlib.suppress(OSError, RekindleError):
            port.rejoin()
            return True
        time.sleep(_PAUSE_SECONDS)
    return False


class Dialer(Protocol):
    """A network in which a server listens: its cell's, or the host's."""

    def socket(self, family: socket.AddressFamily) -> socket.socket:
        """Return a stream socket in that network."""


class Forwarder:
    """Forwards connections within a selector loop. Buffers at most 512 KiB per direction."""

    def __init__(
        self,
        selector: selectors.BaseSelector,
        network: Dialer,
        client_address: ClientAddress | None = None,
    ) -> None:
        """With `client_address`, tell the server in this way who its clients are."""
        self._selector = selector
        self._network = network
        self._client_address = client_address
        self._listeners: dict[socket.socket, Callable[[int], None]] = {}
        self._ports: list[SharedPort] = []
        self._sides: set[Side] = set()
        self._holds = self._is_still = self._is_leaving = False
        self._heard = time.monotonic()

    def idle_seconds(self) -> float:
        """Return for how long no client has asked or got anything; 0 while an answer is awaited."""
        return 0.0 if self.in_flight() else time.monotonic() - self._heard

    def hold(self) -> None:
        """Let new connections wait, and new requests of connections on which nothing is asked just now.

        The server's ends of these are closed, and made again afterwards.
        """
        if not self._holds:
            self._holds = True
            for sock in self._listeners:
                self._selector.unregister(sock)
            for port in self._ports:
                port.hold()
        self._give_back_all()
        for side in list(self._sides):
            if side.can_be_parked:
                self._park(side)
            self._watch(side)

    def leave(self) -> bool:
        """Hand the clients of shared ports to other replicas, each when it has got its answer.

        Returns whether there are such ports.
        """
        self._is_leaving = True
        for port in self._ports:
            port.hold()
        self._give_back_all()
        return bool(self._ports)

    def in_flight(self) -> int:
        """Return how many connections wait for an answer, or get one."""
        return sum(not side.is_server and side.exchange.is_open for side in self._sides)

    def waiting(self) -> int:
        """Return how many clients have sent something that nobody has read yet."""
        poller = select.poll()
        for side in self._sides:
            if not side.is_server and not side.read_closed:
                poller.register(side.sock, select.POLLIN)
        found = [fd for fd, event in poller.poll(0) if event & select.POLLIN]
        ended = [side for side in self._sides if side.sock.fileno() in found and not has_sent(side.sock)]
        return len(found) - len(ended)

    def be_still(self) -> None:
        """Neither read nor write anything until `resume`: the server is going to be frozen."""
        self._is_still = True
        for side in self._sides:
            self._watch(side)

    def resume(self) -> None:
        """Go on after `hold`, and serve what has waited."""
        if self._holds:
            self._holds = self._is_still = False
            for sock, accept in self._listeners.items():
                self._selector.register(sock, selectors.EVENT_READ, accept)
            for port in self._ports:
                if not self._is_leaving:
                    port.ready()
            for side in list(self._sides):
                if side.parked is not None:
                    self._unpark(side, side.parked)
                self._watch(side)

    def accept_from(self, sock: socket.socket, target: Endpoint, new_gate: "NewGate | None" = None) -> None:
        """Forward connections from a listening socket to the server's address `target` from now on.

        With `new_gate`, each connection gets a gate, which sees all its bytes and decides what is passed on.
        """
        sock.setblocking(False)
        accept = functools.partial(self._accept, sock, target, new_gate)
        self._listeners[sock] = lambda _: accept()
        self._selector.register(sock, selectors.EVENT_READ, self._listeners[sock])

    def join(self, port: "SharedPort", target: Endpoint, new_gate: "NewGate | None" = None) -> None:
        """Forward this replica's part of the connections at a shared port, as `accept_from` does."""
        self._ports.append(port)
        self._hear(port, functools.partial(self._take, port, target, new_gate))
        port.ready()

    def _hear(self, port: "SharedPort", take: Callable[[], None]) -> None:
        def hear(_: int) -> None:
            try:
                take()
            except BlockingIOError:
                return
            except OSError:  # the balancer has been killed
                self._selector.unregister(port)
                if _rejoin(port):
                    self._selector.register(port, selectors.EVENT_READ, hear)
                else:
                    self._ports.remove(port)
                    port.close()

        self._selector.register(port, selectors.EVENT_READ, hear)

    def _take(self, port: "SharedPort", target: Endpoint, new_gate: "NewGate | None") -> None:
        """Take what the balancer hands over. Raises BlockingIOError, or another OSError if it is gone."""
        while True:
            found = port.take()
            if found is not None:
                client, place = found
                if self._is_leaving or self._holds:
                    client.close()
                    place.give_back()
                else:
                    self._begin(client, target, new_gate, place)

    def drain(self) -> None:
        """Deliver what a server that has ended wrote to its clients, as the kernel would without a forwarder.

        Stop listening. Give up on clients once none has taken a byte for two seconds.
        """
        self._is_leaving = True
        self.resume()
        self._stop_listening()
        self._give_back_all()
        for side in self._sides:
            with contextlib.suppress(KeyError):
                self._selector.unregister(side.sock)
        with selectors.DefaultSelector() as self._selector:
            for side in list(self._sides):
                if side.is_server:
                    side.stop_writing()
                    self._proceed(side)
            while self._sides and (ready := self._selector.select(_DRAIN_SECONDS)):
                for key, mask in ready:
                    key.data(mask)
            self.close()

    def close(self) -> None:
        """Stop listening, and close every connection."""
        self._stop_listening()
        self._give_back_all()
        for side in list(self._sides):
            self._drop(side)
        for port in self._ports:
            self._selector.unregister(port)
            port.close()
        self._ports.clear()

    def _stop_listening(self) -> None:
        for sock in self._listeners:
            if not self._holds:
                self._selector.unregister(sock)
            sock.close()
        self._listeners.clear()

    def _accept(self, sock: socket.socket, target: Endpoint, new_gate: "NewGate | None") -> None:
        try:
            client, _address = sock.accept()
        except OSError as error:
            if error.errno in {errno.EMFILE, errno.ENFILE}:
                time.sleep(_PAUSE_SECONDS)  # the connection stays in the queue and would wake us at once
            return
        self._begin(client, target, new_gate)

    def _begin(
        self,
        client: socket.socket,
        target: Endpoint,
        new_gate: "NewGate | None",
        place: "SharedPlace | None" = None,
    ) -> None:
        """Connect a client to the server."""
        host = target.reachable_host
        try:
            server = self._network.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        except OSError:
            client.close()
            if place is not None:
                place.give_back()
            return
        near, far = Side(client, place=place), Side(server, is_server=True, connected=False)
        near.other, far.other = far, near
        near.gate = far.gate = self._new_gate(client, target, new_gate)
        if self._client_address is not None:
            far.pending += proxy_header(self._client_address, client)
        far.exchange = near.exchange
        for side in (near, far):
            side.sock.setblocking(False)
            with contextlib.suppress(OSError):
                side.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._sides.add(side)
        far.target = target
        number = server.connect_ex((host, target.port))
        if number not in {0, errno.EINPROGRESS}:
            self._give_back_or_drop(near)
            return
        self._watch(near)
        self._watch(far)

    def _park(self, near: Side) -> None:
        """Close the server's end of a connection on which nothing is asked."""
        far = near.other
        if far is None or far.target is None or not far.connected:
            return
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(far.sock)
        far.sock.close()
        far.parked, far.connected = far.target, False

    def _unpark(self, far: Side, target: Endpoint) -> None:
        """Connect a client to the server again."""
        near, far.parked = far.other, None
        assert near is not None
        host = target.reachable_host
        try:
            far.sock = self._network.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
            far.sock.setblocking(False)
            far.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            number = far.sock.connect_ex((host, target.port))
        except OSError as error:
            number = error.errno or errno.EIO
        if number not in {0, errno.EINPROGRESS}:
            self._drop(near)
        elif self._client_address is not None:
            far.pending += proxy_header(self._client_address, near.sock)

    def _new_gate(
        self, client: socket.socket, target: Endpoint, new_gate: "NewGate | None"
    ) -> "ApiKeyGate | None":
        if self._client_address is not ClientAddress.FORWARDED_FOR:
            return new_gate() if new_gate else None
        address = peer(client)
        if new_gate:
            return new_gate(forwarded_for=address)
        from restore.serve.gate import ApiKeyGate

        return ApiKeyGate(None, str(target), forwarded_for=address)

    def _watch(self, side: Side) -> None:
        """Register for the events that a side waits for: it can be written to, or read from."""
        assert side.other is not None
        if side not in self._sides or side.parked is not None:
            return
        events = 0
        if side.pending or not side.connected:
            events |= selectors.EVENT_WRITE
        is_wanted = not side.read_closed and not side.other.write_closed
        if side.gate is not None and not side.is_server:
            is_wanted = is_wanted and side.gate.waiting_bytes < _BUFFER_BYTES
        if self._holds and not side.is_server:
            is_wanted = is_wanted and side.exchange.is_open
        if side.place is not None:
            is_wanted = is_wanted and side.other.connected  # until then, another replica can have it
        if side.connected and is_wanted and len(side.other.pending) < _BUFFER_BYTES:
            events |= selectors.EVENT_READ
        if self._is_still:
            events = 0
        registered = side.sock in self._selector.get_map()
        if not events:
            if registered:
                self._selector.unregister(side.sock)
        elif registered:
            self._selector.modify(side.sock, events, lambda mask: self._ready(side, mask))
        else:
            self._selector.register(side.sock, events, lambda mask: self._ready(side, mask))

    def _ready(self, side: Side, mask: int) -> None:
        other = side.other
        if side not in self._sides or other is None:
            return
        try:
            if mask & selectors.EVENT_WRITE:
                if not side.connected:
                    number = side.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                    if number not in {0, errno.ECONNRESET, errno.EPIPE}:
                        raise OSError(number, os.strerror(number))
                    side.connected = True
                    if number:  # the server took the connection and ended it, and may have answered before
                        side.stop_writing()
                        mask |= selectors.EVENT_READ
                self._flush(side)
            if mask & selectors.EVENT_READ:
                if side.place is not None:
                    side.overlaps = side.overlaps or side.exchange.is_half_answered
                    side.place.asked()
                content = side.sock.recv(_BUFFER_BYTES)
                self._heard = time.monotonic()
                if side.is_server:
                    side.exchange.from_server(content)
                else:
                    side.exchange.from_client(content)
                if side.gate is not None:
                    self._pass_gate(side, side.gate, content)
                elif content:
                    other.pending += content
                side.read_closed = side.read_closed or not content
                if other.connected:
                    self._flush(other)
        except (BlockingIOError, InterruptedError):
            pass
        except OSError:
            if not side.is_server:
                self._drop(side)
                return
            if not side.connected and other.is_untouched:
                self._give_back(other)
                return
            side.read_closed = True
            side.stop_writing()
            try:
                self._flush(other)  # what the server sent before
            except OSError:
                self._drop(side)
                return
        self._proceed(side)

    def _pass_gate(self, side: Side, gate: "ApiKeyGate", content: bytes) -> None:
        """Hand what one end sent to the gate, and queue what that lets through. Raises OSError."""
        assert side.other is not None
        near, far = (side.other, side) if side.is_server else (side, side.other)
        try:
            if side.is_server:
                gate.from_server(content)
            elif content:
                gate.from_client(content)
        except Exception:  # a bug in the gate must neither let anything pass nor end the server
            traceback.print_exc()
            gate.is_over = True
        near.pending += gate.to_client
        far.pending += gate.to_server
        gate.to_client.clear()
        gate.to_server.clear()
        if gate.is_over:  # the client gets what is pending, and then the end of the stream
            near.read_closed = far.read_closed = True
            far.stop_writing()
        if far.connected:
            self._flush(far)
        self._flush(near)

    def _proceed(self, side: Side) -> None:
        """Wait for the next events of a connection, or forget it if there are none."""
        assert side.other is not None
        if side.write_closed and side.other.write_closed:
            self._drop(side)
            return
        near = side.other if side.is_server else side
        if near.place is not None and not near.place.is_untouched and near.is_answered:
            near.place.idle()
            if self._holds or self._is_leaving:
                self._give_back(near)
                return
        self._watch(side)
        self._watch(side.other)

    def _flush(self, side: Side) -> None:
        """Write as much as possible; after the last byte, pass on the end of the stream."""
        assert side.other is not None
        try:
            while side.pending:
                del side.pending[: side.sock.send(side.pending)]
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            if not side.is_server:
                raise
            side.stop_writing()  # it hears nothing more, and may have answered before
            return
        if side.other.read_closed and not side.write_closed:
            side.write_closed = True
            side.sock.shutdown(socket.SHUT_WR)

    def _give_back_all(self) -> None:
        """Let other replicas have the clients that wait for nothing."""
        for side in list(self._sides):
            if side.is_untouched:
                self._give_back(side)

    def _give_back_or_drop(self, near: Side) -> None:
        if near.is_untouched:
            self._give_back(near)
        else:
            self._drop(near)

    def _give_back(self, near: Side) -> None:
        """Let another replica have a client, whose connection stays open."""
        place, near.place = near.place, None
        self._drop(near)
        if place is not None:
            place.give_back()

    def _drop(self, side: Side) -> None:
        for each in (side, side.other):
            if each is not None and each in self._sides:
                self._sides.discard(each)
                with contextlib.suppress(KeyError, ValueError):
                    self._selector.unregister(each.sock)
                if each.place is not None:  # the balancer has it, too
                    with contextlib.suppress(OSError):
                        each.sock.shutdown(socket.SHUT_RDWR)
                    each.place.done()
                each.sock.close()
