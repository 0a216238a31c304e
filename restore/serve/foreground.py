# SPDX-License-Identifier: Apache-2.0
"""Run a server in the foreground: pass signals on to it, publish its ports, wait for its exit."""

import contextlib
import os
import resource
import selectors
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from msgspec import Struct

from rekindle.cell import Cell, exit_status, processes
from rekindle.cell.borrowed import lend
from rekindle.criu.frozen import is_dumping, letting_run
from rekindle.documents import to_json
from rekindle.engine import Endpoint
from rekindle.errors import RestoreError
from rekindle.fields import JSON
from rekindle.record import Process
from restore.client_address import ClientAddress
from restore.serve.control import Loan
from restore.serve.forward import Forwarder
from restore.serve.shared_port import SharedPort
from restore.signals import ENDING, Signals

if TYPE_CHECKING:
    from restore.serve.gate import NewGate


_CRIU_SECONDS = 60.0
_POLL_SECONDS = 0.01
_LEAVE_SECONDS = 10.0

Facts = Callable[[], Mapping[str, JSON]]


class Replica(Protocol):
    """A running server, in a cell or as our child."""

    def status(self) -> int | None:
        """Return its exit status, 128 + N for signal N; None while it runs.

        Raises RestoreError if it was killed and does not end.
        """

    def signal(self, signum: int) -> None:
        """Pass on a signal that we got, unless its sender has signalled the server, too."""

    def child(self) -> int:
        """Return the PID of our child, which only the replica may reap."""

    def fileno(self) -> int:
        """Return a descriptor that is readable when `status` may have changed."""

    def socket(self, family: socket.AddressFamily) -> socket.socket:
        """Return a stream socket in the server's network."""


class ServerPids(Struct, frozen=True, kw_only=True):
    """The PIDs in the cell of the root of a server's processes, and of the one that gets its signals."""

    root_pid: int
    server_pid: int


class RestoredServer:
    """A server in a cell."""

    def __init__(
        self,
        cell: Cell,
        process: Process | ServerPids,
        kill: Callable[[], None] | None = None,
        output: Sequence[int] = (),
        facts: Facts = dict,
    ) -> None:
        """`kill` ends a server that must not end by itself when it is asked to.

        Its output leads to the descriptors of ours `output`; `facts` are for whoever borrows its cell.
        """
        self._cell = cell
        self._process = process
        self._kill = kill
        self._killed: int | None = None
        self._stuck: RestoreError | None = None
        self._output, self._facts = output, facts
        self._is_lent = self._was_lost = False

    def status(self) -> int | None:
        if self._stuck is not None:
            raise self._stuck
        if self._killed is not None:
            return 128 + self._killed
        if self._is_lent:
            return None
        root, server = self._process.root_pid, self._process.server_pid
        status = self._cell.wait(root, 0.0)
        if status is None and self._was_lost and not processes.runs(self._cell, root):
            status = signal.SIGKILL  # its end was told to a borrower that was killed
        if status is not None and os.WIFSIGNALED(status) and server != root:
            # A signal has ended only the shell above the server, which is a child of the cell's init now.
            runs = processes.runs(self._cell, server)
            ended = self._cell.wait(server, 0.0)
            status = None if runs and ended is None else status if ended is None else ended
        return None if status is None else exit_status(status)

    def signal(self, signum: int) -> None:
        if self._kill is not None and signum in ENDING:
            self._killed = self._killed or signum
            try:
                self._kill()
            except RestoreError as stuck:
                self._stuck = stuck
            return
        self._cell.relay(self._process.server_pid, signum)

    def lend(self) -> Loan:
        lent, fds = lend(self._cell)
        self._is_lent = True
        return Loan(cell=to_json(lent), fds=[*self._output, *fds])

    def facts(self) -> Mapping[str, JSON]:
        return self._facts()

    def take_back(self, exits: Mapping[int, int] | None) -> None:
        self._is_lent = False
        if exits is None:
            self._was_lost = True
            self._await_criu()
        self._cell.note_exits(exits or {})

    def _await_criu(self) -> None:
        """Wait until CRIU, whose borrower was killed, has let the processes run on."""
        deadline = time.monotonic() + _CRIU_SECONDS
        with letting_run(self._cell), contextlib.suppress(RestoreError):  # the cell has ended
            for pid in self._cell.settle():
                self._cell.wait(pid, _CRIU_SECONDS)
            while time.monotonic() < deadline and is_dumping(self._cell):
                time.sleep(_POLL_SECONDS)

    def child(self) -> int:
        return self._cell.launcher_pid

    def fileno(self) -> int:
        return self._cell.fileno()

    def socket(self, family: socket.AddressFamily) -> socket.socket:
        return self._cell.socket(family)


class Serving:
    """A context that serves a server's clients. `signalled` is the first signal that asked it to end.

    `client_address` says how the server learns their addresses; set it before anything is published.
    """

    def __init__(
        self,
        replica: Replica,
        signals: Signals,
        asked_to_end: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Serve a replica.

        `asked_to_end` is called with every signal that asks the server to end, after it was passed on.
        """
        self.signalled: int | None = None
        self.client_address: ClientAddress | None = None
        self._status: int | None = None
        self._replica = replica
        self._signals = signals
        self._asked_to_end = asked_to_end
        self._forwarder: Forwarder | None = None
        self._left_cell = False
        self._leaving: tuple[int, float] | None = None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self._selector = stack.enter_context(selectors.DefaultSelector())
            self.watch(self._signals.fileno(), self._take_signals)
            self.watch(self._replica.fileno(), self._look)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def watch(self, fd: int, readable: Callable[[], object]) -> None:
        """Call `readable` whenever a descriptor is readable."""
        self._selector.register(fd, selectors.EVENT_READ, lambda _: readable())

    def forget(self, fd: int) -> None:
        """Stop watching a descriptor."""
        self._selector.unregister(fd)

    def publish(self, sock: socket.socket, target: Endpoint, new_gate: "NewGate | None" = None) -> None:
        """Forward connections from a listening socket to the server, each through a gate if one is needed.

        `target` is where the server listens.
        """
        self._forwarding().accept_from(sock, target, new_gate)

    def share(self, port: SharedPort, target: Endpoint, new_gate: "NewGate | None" = None) -> None:
        """Forward this replica's part of the connections at a shared port, as `publish` does."""
        self._forwarding().join(port, target, new_gate)

    def _forwarding(self) -> Forwarder:
        if self._forwarder is None:
            # A connection takes two descriptors. A server that runs already keeps its own limit.
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            with contextlib.suppress(OSError, ValueError):
                resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
                self._stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
            self._forwarder = Forwarder(self._selector, self._replica, self.client_address)
            self._stack.callback(self._forwarder.close)
        return self._forwarder

    def hold(self) -> int:
        """Let new requests wait; return how many are in flight."""
        if self._forwarder is None:
            return 0
        self._forwarder.hold()
        return self._forwarder.in_flight()

    def idle_seconds(self) -> float:
        """Return for how long no client has asked or got anything; 0 if that is unknown."""
        return self._forwarder.idle_seconds() if self._forwarder is not None else 0.0

    def waiting(self) -> int:
        """Return how many clients have sent something that nobody has read yet."""
        return self._forwarder.waiting() if self._forwarder is not None else 0

    def leave_cell(self) -> None:
        """Leave the server's cell alone until `resume`, but for new connections and signals. Idempotent."""
        if not self._left_cell:
            self.forget(self._replica.fileno())
            self._left_cell = True

    def be_still(self) -> None:
        """Leave the server and its connections alone until `resume`. Signals are passed on meanwhile."""
        self.leave_cell()
        if self._forwarder is not None:
            self._forwarder.be_still()

    def resume(self) -> None:
        """Go on after `hold`, `leave_cell` or `be_still`."""
        if self._forwarder is not None:
            self._forwarder.resume()
        if self._left_cell:
            self._left_cell = False
            self.watch(self._replica.fileno(), self._look)
            self._look()

    def run(self, until: Callable[[], bool] = lambda: False) -> int | None:
        """Serve until the server exits; return its exit status. Return None as soon as `until` holds."""
        self._take_signals()  # what came before we watched
        self._look()
        while self._status is None:
            if until():
                return None
            for key, mask in self._selector.select(None if self._leaving is None else _POLL_SECONDS):
                key.data(mask)
            self._leave()
        if self._forwarder is not None:
            self._forwarder.drain()
        return self._status

    def _look(self) -> None:
        self._status = self._replica.status()

    def _take_signals(self) -> None:
        """Pass signals on, and reap the children that have exited."""
        for signum in self._signals.take():
            if self._hands_over(signum):
                self._leaving = signum, time.monotonic() + _LEAVE_SECONDS
            else:
                self._pass_on(signum)
            if signum in ENDING:
                self.signalled = self.signalled or signum
                self._asked_to_end(signum)
                self._look()
        _reap(self._replica.child())

    def _pass_on(self, signum: int) -> None:
        with contextlib.suppress(RestoreError):  # the cell has ended: `status` will say how
            self._replica.signal(signum)

    def _hands_over(self, signum: int) -> bool:
        """Hand the clients of shared ports to other replicas, if that is possible before a signal."""
        if signum not in ENDING - {signal.SIGHUP} or self._leaving or self._left_cell:
            return False
        return self._forwarder is not None and self._forwarder.leave()

    def _leave(self) -> None:
        """Pass on the signal that the server has not got yet, once its last request is answered."""
        if self._leaving is not None and self._forwarder is not None:
            signum, deadline = self._leaving
            if not self._forwarder.in_flight() or time.monotonic() > deadline:
                self._leaving = None
                self._pass_on(signum)


def _reap(own: int) -> None:
    """Reap orphans, which come to us as PID 1 of a container or as the parent of a server.

    Leave `own`, our own child, to the replica, which waits for it.
    """
    with contextlib.suppress(ChildProcessError):
        while found := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            if found.si_pid == own:
                return
            os.waitpid(found.si_pid, os.WNOHANG)
