# SPDX-License-Identifier: Apache-2.0
"""The lower rungs: a server that is started as its command says, beside us and not in a cell."""

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from rekindle.errors import UsageError
from rekindle.run import end_group, start_server

_PIECE_BYTES = 1 << 16
_KEPT_BYTES = 4 << 20
_DRAIN_SECONDS = 5.0


class Started:
    """A running server. Leaving the context ends it, and all of its process group."""

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
        with contextlib.ExitStack() as stack:
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
            if self._copier is not None:
                self._copier.close_writers()
            stack.callback(end_group, self._process)
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
        code = self._process.poll()
        return None if code is None else code if code >= 0 else 128 - code

    def signal(self, signum: int) -> None:
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signum)

    def child(self) -> int:
        return self._process.pid

    def fileno(self) -> int:
        return self._pidfd

    def socket(self, family: socket.AddressFamily) -> socket.socket:
        return socket.socket(family, socket.SOCK_STREAM)


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
                view = memoryview(piece)
                while view:
                    view = view[os.write(target, view) :]
        except OSError:
            pass  # nobody reads our output any more; the server is told as it would be without us
        finally:
            os.close(reader)
