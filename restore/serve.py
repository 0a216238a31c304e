# SPDX-License-Identifier: Apache-2.0
"""A server in the foreground: signals go to it, its port is published, its end is ours."""

import contextlib
import os
import resource
import selectors
import signal
import socket
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Protocol, Self

from rekindle.cell import Cell, exit_status
from rekindle.engine import Endpoint
from rekindle.record import Process
from restore.forward import Forwarder

_FORWARDED = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
)
_ENDING = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT})


class Replica(Protocol):
    """A server that runs for us, in a cell or beside us."""

    def status(self) -> int | None:
        """Its exit status as the shell counts, once it has ended."""

    def signal(self, signum: int) -> None:
        """Sends it a signal; nothing happens if it is gone."""

    def child(self) -> int:
        """The PID of our own child, which only `status` may reap."""

    def fileno(self) -> int:
        """Readable when `status` may have changed."""

    def socket(self, family: socket.AddressFamily) -> socket.socket:
        """A stream socket in the network that it listens in."""


class Restored:
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
        self, replica: Replica, endpoint: Endpoint | None, asked_to_end: Callable[[int], None]
    ) -> None:
        """`endpoint` is where the server listens; `asked_to_end` is told of the first such signal."""
        self.signalled: int | None = None
        self._told = False
        self._replica = replica
        self._endpoint = endpoint
        self._asked_to_end = asked_to_end
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        # Two descriptors a connection; the server's own limit is not touched by this.
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        with self._stack as stack:
            self._selector = stack.enter_context(selectors.DefaultSelector())
            wakeups = stack.enter_context(self._signals())
            self.watch(wakeups, lambda: os.read(wakeups, 4096))
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
        forwarder = Forwarder(self._selector, self._replica, self._endpoint)
        self._stack.callback(forwarder.close)
        forwarder.accept_from(sock)

    def run(self, until: Callable[[], bool] = lambda: False) -> int | None:
        """Looks after the server until it ends; returns its exit status. None as soon as `until` holds."""
        while True:
            status = self._replica.status()
            if status is not None:
                return status
            if until():
                return None
            for key, mask in self._selector.select():
                key.data(mask)
            if self.signalled is not None and not self._told:
                self._told = True
                self._asked_to_end(self.signalled)
            if os.getpid() == 1:
                _reap(self._replica.child())

    @contextlib.contextmanager
    def _signals(self) -> Iterator[int]:
        """Passes signals on to the server while it serves; yields a descriptor that wakes a selector."""

        def pass_on(signum: int, _: object) -> None:
            self._replica.signal(signum)
            if signum in _ENDING and self.signalled is None:
                self.signalled = signum

        reader, writer = os.pipe()
        os.set_blocking(reader, False)
        os.set_blocking(writer, False)
        heeded = [signum for signum in _FORWARDED if signal.getsignal(signum) is not signal.SIG_IGN]
        before = {signum: signal.signal(signum, pass_on) for signum in heeded}
        before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda *_: None)  # for the descriptor alone
        wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        try:
            yield reader
        finally:
            signal.set_wakeup_fd(wakeup)
            for signum, handler in before.items():
                signal.signal(signum, handler)
            os.close(reader)
            os.close(writer)


def _reap(own: int) -> None:
    """As PID 1 we inherit the orphans of the container. Our own child is left to who waits for it."""
    while True:
        try:
            found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        if found is None or found.si_pid == own:
            return
        os.waitpid(found.si_pid, os.WNOHANG)
