# SPDX-License-Identifier: Apache-2.0
"""The lower rungs: a server that is started as its command says, beside us and not in a cell."""

import contextlib
import ctypes
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from rekindle.errors import UsageError
from rekindle.run import start_server

_PIECE_BYTES = 1 << 16
_KEPT_BYTES = 4 << 20
_DRAIN_SECONDS = 5.0
_GRACE_SECONDS = 5.0
_POLL_SECONDS = 0.02
_PR_SET_CHILD_SUBREAPER = 36


class Started:
    """A running server. Leaving the context ends it, and all that it started."""

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
        """Starts it with our descriptors as its standard output and error. With `listen`, they pass
        through us unchanged, and `log` tells what was written. Must be called by the main thread: the server
        ends with it. Raises UsageError if there is no such command."""
        self._copier: _Copier | None = None
        self._status: int | None = None
        self._others = set(_children())  # whoever became us with exec may have started some
        with contextlib.ExitStack() as stack:
            # What leaves the server's session and loses its parent comes to us, and not to somebody else.
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
                    f"{argv[0]} cannot be started", cause=str(error), hint="is its environment on PATH?"
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
    def log(self) -> str:
        """What it wrote until now, without what is above some MiB."""
        return self._copier.text if self._copier else ""

    def status(self) -> int | None:
        # It is not reaped before the end: until then its number, and that of its group, are nobody else's.
        if self._status is None:
            found = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if found is not None:
                exited = found.si_code == os.CLD_EXITED
                self._status = found.si_status if exited else 128 + found.si_status
        return self._status

    def signal(self, signum: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signum)

    def child(self) -> int:
        return self._process.pid

    def fileno(self) -> int:
        return self._pidfd

    def socket(self, family: socket.AddressFamily) -> socket.socket:
        return socket.socket(family, socket.SOCK_STREAM)

    def _end(self) -> None:
        """TERM for its process group and for what it left behind, then KILL. The server is reaped last."""
        told: set[int] = set()
        signum, until = signal.SIGTERM, time.monotonic() + _GRACE_SECONDS
        self._signal_group(signum)
        while True:
            left = self._left()
            if not left:
                break
            if time.monotonic() >= until:
                if signum == signal.SIGKILL:  # in the kernel's hands, as on a dead NFS
                    break
                signum, until = signal.SIGKILL, time.monotonic() + _GRACE_SECONDS
                told.clear()
                self._signal_group(signum)
            for pid in left:
                if pid not in told and pid != self._process.pid:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signum)
            told.update(left)
            time.sleep(_POLL_SECONDS)
        self._signal_group(signal.SIGKILL)
        self._process.poll()

    def _signal_group(self, signum: int) -> None:
        with contextlib.suppress(
            ProcessLookupError, PermissionError
        ):  # the latter if it became somebody else
            os.killpg(self._process.pid, signum)

    def _left(self) -> list[int]:
        """Our children that came with the server and still run. Those that have ended are reaped, but for
        the server."""
        left = []
        for pid in _children():
            if pid == self._process.pid:
                left += [pid] if self.status() is None else []
            elif pid not in self._others:
                with contextlib.suppress(ChildProcessError):
                    left += [pid] if os.waitpid(pid, os.WNOHANG) == (0, 0) else []
        return left


def _children() -> Iterator[int]:
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(
            OSError
        ):  # a thread that has ended, or a kernel without CONFIG_PROC_CHILDREN
            yield from map(int, (task / "children").read_text().split())


class _Copier:
    """Carries what the server writes to where it shall go, byte by byte, and keeps the beginning of it.

    One pipe for both if both go to one place, so that the order stays as it was written.
    """

    def __init__(self, stdout: int, stderr: int) -> None:
        self._kept = bytearray()
        self._threads: list[threading.Thread] = []
        self._pipes: list[tuple[int, int]] = []
        same = os.path.samestat(os.fstat(stdout), os.fstat(stderr))
        for target in (stdout,) if same else (stdout, stderr):
            reader, writer = os.pipe()
            self._pipes.append((reader, writer))
            self._threads.append(threading.Thread(target=self._carry, args=[reader, target], daemon=True))
        self.writers = self._pipes[0][1], self._pipes[-1][1]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close_writers()
        for thread in self._threads:  # they end with the last of the server's processes
            thread.join(_DRAIN_SECONDS)

    @property
    def text(self) -> str:
        return bytes(self._kept).decode(errors="replace")

    def close_writers(self) -> None:
        """Ours; idempotent. What the server holds of them stays open."""
        self._pipes, pipes = [], self._pipes
        for writer in {writer for _, writer in pipes}:
            os.close(writer)

    def _carry(self, reader: int, target: int) -> None:
        try:
            while piece := os.read(reader, _PIECE_BYTES):
                if len(self._kept) < _KEPT_BYTES:
                    self._kept += piece
                _write(target, memoryview(piece))
        except BrokenPipeError:
            pass  # nobody reads our output any more; the server is told as it would be without us
        finally:
            os.close(reader)


def _write(target: int, view: memoryview) -> None:
    """Writes all of it, also where somebody has made the descriptor non-blocking. What a full disk does not
    take is lost, as it would be without us. Raises BrokenPipeError."""
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
