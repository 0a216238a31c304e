# SPDX-License-Identifier: Apache-2.0
"""Keep signals and deadlines until they are asked for, and raise them only where work may be interrupted.

A handler that raises may do so between any two instructions, also in the middle of a clean-up, which would
then never be finished. So these handlers raise only within `Signals.raising`, and only once.
"""

import contextlib
import os
import signal
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

from rekindle.cell.relay import SIGNALS
from rekindle.errors import Interrupted

ENDING = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT})
"""The signals that ask a process to end."""


class DeadlinePassed(BaseException):
    """A deadline of `seconds` has passed. Not an Exception, so that it is not caught as an error."""

    def __init__(self, seconds: float) -> None:
        super().__init__(seconds)
        self.seconds = seconds


class Signals:
    """A context that keeps signals, for the main thread.

    `fileno` is readable when a signal has come or a child has exited. Signals that were ignored at the start,
    as under nohup, stay ignored.
    """

    def __init__(self) -> None:
        self._pending: list[int] = []
        self._asked_to_end = False
        self._raises = False
        self._raised: BaseException | None = None
        self._seconds = 0.0
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self._reader, writer = os.pipe()
            for fd in (self._reader, writer):
                stack.callback(os.close, fd)
                os.set_blocking(fd, False)
            for signum in SIGNALS:
                if signal.getsignal(signum) is not signal.SIG_IGN:
                    stack.callback(self._reset, signum, signal.signal(signum, self._handle))
            for signum in (signal.SIGALRM, signal.SIGCHLD):  # SIGCHLD only makes the descriptor readable
                stack.callback(signal.signal, signum, signal.signal(signum, self._handle))
            stack.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(writer, warn_on_full_buffer=False))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def fileno(self) -> int:
        return self._reader

    def take(self) -> list[int]:
        """Return the pending signals in order, and forget them."""
        with contextlib.suppress(BlockingIOError):
            while os.read(self._reader, 4096):
                pass
        pending, self._pending = self._pending, []
        return pending

    def check(self) -> None:
        """Raise Interrupted if a pending signal asks us to end."""
        for signum in self._pending:
            if signum in ENDING:
                raise Interrupted(signum)

    @contextlib.contextmanager
    def raising(self, seconds: float | None = None) -> Iterator[None]:
        """Raise Interrupted or DeadlinePassed at any point within the context.

        Interrupted for a signal that asks us to end, also for one that is pending; DeadlinePassed after
        `seconds`. Only the first of them is raised.
        """
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        self._raised = None
        self._seconds = seconds or 0.0
        self._raises = True
        try:
            self.check()
            signal.setitimer(signal.ITIMER_REAL, self._seconds)
            yield
        finally:
            self._raises = False
            signal.setitimer(signal.ITIMER_REAL, 0.0)
        if self._raised is not None:  # again, if it was raised where it is ignored, such as in __del__
            raise self._raised

    def _handle(self, signum: int, _: object) -> None:
        if signum in SIGNALS:
            self._pending.append(signum)
        error: BaseException = DeadlinePassed(self._seconds)
        if signum in ENDING:
            self._asked_to_end = True
            error = Interrupted(signum)
        elif signum != signal.SIGALRM:
            return
        if self._raises:
            self._raises = False
            self._raised = error
            raise error

    def _reset(self, signum: int, before: Any) -> None:
        """Reset a handler. Ignore further signals if one has asked us to end already."""
        signal.signal(signum, signal.SIG_IGN if self._asked_to_end else before)
