# SPDX-License-Identifier: Apache-2.0
"""A server that was not started in a cell, seen as if the namespaces in which it runs were one.

They are ours, so that CRIU, which runs in them, too, sees a plain process tree. Nothing is mounted, and no
process ends with it; whatever is started is a child of ours.
"""

import contextlib
import os
import select
import signal
import socket
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rekindle.cell import Cell, Clocks, Command
from rekindle.errors import RestoreError
from rekindle.run import TimeoutExpired, spawn

NAMESPACES = ("pid", "mnt", "net", "ipc", "uts", "user", "time", "cgroup")


class ForeignCell(Cell):
    """The namespaces of a running process, and its descendants as the processes in them."""

    def __init__(self, pid: int) -> None:
        """Raises ProcessLookupError."""
        self._reset()
        self._init = self.only = pid
        self._server = os.pidfd_open(pid)
        self._children: dict[int, Any] = {}
        self._watched = self._server
        self.clocks_offset = Clocks(monotonic_ns=0, boottime_ns=0)

    @property
    def root(self) -> Path:
        return Path("/")

    @property
    def launcher_pid(self) -> int:
        raise NotImplementedError("it was not started by us")

    def spawn(self, command: Command) -> int:
        """Start a command as a child of ours and return its PID."""
        with contextlib.ExitStack() as opened:
            fds = {}
            for number, path in command.files.items():
                flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND if number else os.O_RDONLY
                fds[number] = os.open(path, flags | os.O_CLOEXEC, 0o600)
                opened.callback(os.close, fds[number])
            child = spawn(
                command.argv, env=command.env, cwd=command.cwd, stdin=fds[0], stdout=fds[1], stderr=fds[2]
            )
        self._children[child.pid] = child
        self._watched = os.pidfd_open(child.pid)
        return child.pid

    def wait(self, pid: int, timeout: float) -> int | None:
        """Wait for the server or a command to end, as Cell.wait; how the server ended is not known."""
        child = self._children.get(pid)
        if child is None:
            return 0 if select.select([self._server], [], [], timeout)[0] else None
        try:
            code: int = child.wait(timeout)
        except TimeoutExpired:
            return None
        return code << 8 if code >= 0 else -code

    def signal(self, pid: int, signum: int, *, thread: int | None = None) -> None:  # noqa: ARG002
        with contextlib.suppress(ProcessLookupError):
            if pid in self._children:
                self._children[pid].send_signal(signal.Signals(signum))

    def untraced(self) -> set[tuple[int, str]]:
        """Return nothing: what it has done without a trace is not known."""
        return set()

    def fileno(self) -> int:
        """Return a descriptor that is readable when the last command has ended."""
        return self._watched

    def end(self) -> None:
        for fd in {self._server, self._watched}:
            with contextlib.suppress(OSError):
                os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def socket(self, family: socket.AddressFamily) -> socket.socket:
        return socket.socket(family, socket.SOCK_STREAM)

    def _ended(self) -> RestoreError:
        return RestoreError("the server has ended")
