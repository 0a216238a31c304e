# SPDX-License-Identifier: Apache-2.0
"""A server in the foreground: signals go to it, its port is published, its end is ours."""

import contextlib
import os
import resource
import selectors
import socket
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, Self

from rekindle.cell import Cell, exit_status
from rekindle.engine import Endpoint
from rekindle.errors import RestoreError
from rekindle.record import Process
from restore.serve.forward import Forwarder
from restore.signals import ENDING, Signals


class Replica(Protocol):
    """A server that runs for us, in a cell or beside us."""

    def status(self) -> int | None:
        """Its exit status as the shell counts, once it has ended."""

    def signal(self, signum: int) -> None:
        """Sends it a signal; nothing happens if it is gone."""

    def child(self) -> int:
        """The PID of our own child, which only the replica reaps."""

    def fileno(self) -> int:
        """Readable when `status` may have changed."""

    def socket(self, family: socket.AddressFamily) -> socket.socket:
        """A stream socket in the network that it listens in."""


class RestoredServer:
    """A server that was restored in a cell."""

    def __init__(self, cell: Cell, process: Process) -> None:
        self._cell = cell
        self._process = process

    def status(self) -> int | None:
        status = self._cell.wait(self._process.root_pid, 0.0)
        return None if status is None else exit_status(status)

    def signal(self, signum: int) -> None:
        self._cell.signal(self._process.server_pid, signum)

    def child(self) -> int:
        return self._cell.launcher_pid

    def fileno(self) -> int:
        return self._cell.fileno()

    def socket(self, family: socket.AddressFamily) -> socket.socket:
        return self._cell.socket(family)


class Serving:
    """A context in which a server is looked after. `signalled` is the first signal that asked it to end."""

    def __init__(
        self,
        replica: Replica,
        endpoint: Endpoint | None,
        signals: Signals,
        asked_to_end: Callable[[int], None] = lambda _: None,
    ) -> None:
        """`endpoint` is where the server listens; `asked_to_end` is told of every such signal, after the
        server was."""
        self.signalled: int | None = None
        self._replica = replica
        self._endpoint = endpoint
        self._signals = signals
        self._asked_to_end = asked_to_end
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self._selector = stack.enter_context(selectors.DefaultSelector())
            self.watch(self._signals.fileno(), lambda: None)
            self.watch(self._replica.fileno(), lambda: None)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def watch(self, fd: int, readable: Callable[[], object]) -> None:
        """Calls `readable` whenever there is something to read from a descriptor."""
        self._selector.register(fd, selectors.EVENT_READ, lambda _: readable())

    def forget(self, fd: int) -> None:
        """No longer watches a descriptor."""
        self._selector.unregister(fd)

    def publish(self, sock: socket.socket) -> None:
        """Carries the connections to a listening socket to the server from now on."""
        assert self._endpoint is not None
        # Two descriptors a connection. A server that was started before keeps its own limit.
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            self._stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        forwarder = Forwarder(self._selector, self._replica, self._endpoint)
        self._stack.callback(forwarder.close)
        forwarder.accept_from(sock)

    def run(self, until: Callable[[], bool] = lambda: False) -> int | None:
        """Looks after the server until it ends; returns its exit status. None as soon as `until` holds."""
        while True:
            self._pass_signals_on()
            _reap(self._replica.child())
            status = self._replica.status()
            if status is not None:
                return status
            if until():
                return None
            for key, mask in self._selector.select():
                key.data(mask)

    def _pass_signals_on(self) -> None:
        for signum in self._signals.take():
            with contextlib.suppress(RestoreError):  # its cell has ended: `status` tells how
                self._replica.signal(signum)
            if signum in ENDING:
                self.signalled = self.signalled or signum
                self._asked_to_end(signum)


def _reap(own: int) -> None:
    """Orphans come to us, as PID 1 of a container and from a server that we started. Our own child is left
    to who waits for it."""
    with contextlib.suppress(ChildProcessError):
        while found := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            if found.si_pid == own:
                return
            os.waitpid(found.si_pid, os.WNOHANG)
