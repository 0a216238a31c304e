# SPDX-License-Identifier: Apache-2.0
"""Run a server as a child process, outside any cell, for the cache rung and the cold one."""

import contextlib
import ctypes
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from rekindle.cell import relay
from rekindle.errors import UsageError
from rekindle.proc import children
from rekindle.run import spawn, start_server

_PIECE_BYTES = 1 << 16
_KEPT_BYTES = 4 << 20
_DRAIN_SECONDS = 5.0
_GRACE_SECONDS = 5.0
_POLL_SECONDS = 0.02
_PR_SET_CHILD_SUBREAPER = 36
_OURSELVES = Path("/proc/self")


class ChildServer:
    """A running server. Leaving the context ends it and every process that it started."""

    def __init__(
        self,
        argv: Sequence[str],
        *,
        environment: Mapping[str, str],
        directory: Path,
        stdout: int,
        stderr: int,
        listen: bool = False,
    ) -> None:
        """Start the server with the given descriptors as its standard output and error.

        With `listen`, its output passes through us unchanged, and its beginning is kept in
        `first_output`. Call this in the main thread: the server ends when the thread that started it does.
        Raises UsageError if the command cannot be started.
        """
        self._copier: _Copier | None = None
        self._status: int | None = None
        with contextlib.ExitStack() as stack:
            self._relay = stack.enter_context(_start_relay())
            self._others = set(children(_OURSELVES))  # a program that became us by exec may have started some
            # Become the parent of orphans that the server leaves behind, to be able to end them.
            libc = ctypes.CDLL(None)
            libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
            stack.callback(libc.prctl, _PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
            if listen:
                self._copier = stack.enter_context(_Copier(stdout, stderr))
                stdout, stderr = self._copier.writers
            try:
                self._process = start_server(
                    argv, env=environment, cwd=directory, stdout=stdout, stderr=stderr
                )
            except OSError as error:
                raise UsageError(
                    f"cannot start {argv[0]}", cause=str(error), hint="is its virtual environment on PATH?"
                ) from None
            stack.callback(self._end)
            if self._copier is not None:
                self._copier.close_writers()
            self._pidfd = os.pidfd_open(self._process.pid)
            stack.callback(os.close, self._pidfd)
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def first_output(self) -> str:
        """The first 4 MiB of what the server has written so far; empty without `listen`."""
        return self._copier.text if self._copier else ""

    def status(self) -> int | None:
        # Not reaped here: until it is, no other process can get its PID or its group's.
        if self._status is None:
            found = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if found is not None:
                exited = found.si_code == os.CLD_EXITED
                self._status = found.si_status if exited else 128 + found.si_status
        return self._status

    def signal(self, signum: int) -> None:
        try:
            socket.send_fds(self._relay, [bytes([signum])], [self._pidfd])
        except OSError:  # it was killed
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signum)

    def child(self) -> int:
        return self._process.pid

    def fileno(self) -> int:
        return self._pidfd

    def socket(self, family: socket.AddressFamily) -> socket.socket:
        return socket.socket(family, socket.SOCK_STREAM)

    def _end(self) -> None:
        """Send TERM, then KILL, to the server's process group and its orphans. Reap the server last."""
        signalled: set[int] = set()
        signum, until = signal.SIGTERM, time.monotonic() + _GRACE_SECONDS
        self._signal_group(signum)
        while True:
            left = self._left()
            if not left:
                break
            if time.monotonic() >= until:
                if signum == signal.SIGKILL:  # stuck in the OS kernel, for example on a dead NFS
                    break
                signum, until = signal.SIGKILL, time.monotonic() + _GRACE_SECONDS
                signalled.clear()
                self._signal_group(signum)
            for pid in left:
                if pid not in signalled and pid != self._process.pid:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signum)
            signalled.update(left)
            time.sleep(_POLL_SECONDS)
        self._signal_group(signal.SIGKILL)
        self._process.poll()

    def _signal_group(self, signum: int) -> None:
        # PermissionError: the server has changed its user.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signum)

    def _left(self) -> list[int]:
        """Return our running children that came with the server. Reap those that have ended, except it."""
        left = []
        for pid in children(_OURSELVES):
            if pid == self._process.pid:
                left += [pid] if self.status() is None else []
            elif pid not in self._others:
                with contextlib.suppress(ChildProcessError):
                    left += [pid] if os.waitpid(pid, os.WNOHANG) == (0, 0) else []
        return left


@contextlib.contextmanager
def _start_relay() -> Iterator[socket.socket]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        with theirs:
            argv = [sys.executable, "-I", "-S", "-B", relay.__file__, str(theirs.fileno())]
            before = relay.block_signals()  # it inherits that, so that none ends it while Python starts
            try:
                process = spawn(argv, env={"PATH": os.defpath}, pass_fds=[theirs.fileno()], stderr=2)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        try:
            yield ours
        finally:
            ours.close()
            process.wait()


class _Copier:
    """Copy what the server writes to its destinations, unchanged, and keep the beginning of it.

    Both streams share a pipe if they have the same destination, so that their order is kept.
    """

    def __init__(self, stdout: int, stderr: int) -> None:
        self._kept = bytearray()
        self._threads: list[threading.Thread] = []
        self._pipes: list[tuple[int, int]] = []
        same = os.path.samestat(os.fstat(stdout), os.fstat(stderr))
        for target in (stdout,) if same else (stdout, stderr):
            reader, writer = os.pipe()
            self._pipes.append((reader, writer))
            self._threads.append(threading.Thread(target=self._copy, args=[reader, target], daemon=True))
        self.writers = self._pipes[0][1], self._pipes[-1][1]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close_writers()
        for thread in self._threads:  # they end when the last process of the server does
            thread.join(_DRAIN_SECONDS)

    @property
    def text(self) -> str:
        return bytes(self._kept).decode(errors="replace")

    def close_writers(self) -> None:
        """Close our copies of the write ends. The server's stay open. Idempotent."""
        self._pipes, pipes = [], self._pipes
        for writer in {writer for _, writer in pipes}:
            os.close(writer)

    def _copy(self, reader: int, target: int) -> None:
        try:
            while piece := os.read(reader, _PIECE_BYTES):
                if len(self._kept) < _KEPT_BYTES:
                    self._kept += piece
                _write(target, memoryview(piece))
        except BrokenPipeError:
            pass  # our output has no reader: closing the pipe tells the server, as it would without us
        finally:
            os.close(reader)


def _write(target: int, view: memoryview) -> None:
    """Write all of `view`, even to a non-blocking descriptor. Raises BrokenPipeError.

    After another error, such as a full disk, the rest is dropped, as it would be without us.
    """
    while view:
        try:
            view = view[os.write(target, view) :]
        except BlockingIOError:
            room = select.poll()
            room.register(target, select.POLLOUT)
            room.poll()
        except BrokenPipeError:
            raise
        except OSError:
            return
