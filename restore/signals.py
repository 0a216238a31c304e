# SPDX-License-Identifier: Apache-2.0
"""Signals to us, and deadlines: kept until somebody asks, and raised only where work may be broken off.

What a signal raises comes between any two instructions: in the middle of a clean-up, too, of which the rest
would then never be done. So it comes only where that was asked for, and only once.
"""

import contextlib
import os
import signal
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

from rekindle.errors import Interrupted

ENDING = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT})
"""Those that ask to end."""

_KEPT = (*sorted(ENDING), signal.SIGUSR1, signal.SIGUSR2)


class DeadlinePassed(BaseException):
    """Something was not done after `seconds`: no error, and not to be caught as one."""

    def __init__(self, seconds: float) -> None:
        super().__init__(seconds)
        self.seconds = seconds


class Signals:
    """A context in which signals are kept. For the main thread; `fileno` is readable when one came, or a
    child ended. Those that were ignored when it began, as nohup wants it, stay so."""

    def __init__(self) -> None:
        self._came: list[int] = []
        self._asked = False
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
            for signum in _KEPT:
                if signal.getsignal(signum) is not signal.SIG_IGN:
                    stack.callback(self._give_back, signum, signal.signal(signum, self._arrived))
            for signum in (signal.SIGALRM, signal.SIGCHLD):  # the latter for the descriptor alone
                stack.callback(signal.signal, signum, signal.signal(signum, self._arrived))
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
        """The signals that came since they were last taken, in order."""
        with contextlib.suppress(BlockingIOError):
            while os.read(self._reader, 4096):
                pass
        came, self._came = self._came, []
        return came

    def check(self) -> None:
        """Raises Interrupted if one came that asks us to end, and was not taken."""
        for signum in self._came:
            if signum in ENDING:
                raise Interrupted(signum)

    @contextlib.contextmanager
    def raising(self, seconds: float | None = None) -> Iterator[None]:
        """Within, a signal that asks us to end raises Interrupted, and DeadlinePassed comes when the seconds
        are over: the first of them, wherever we are, and then no other."""
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
        if self._raised is not None:  # where nothing can be raised, such as in __del__
            raise self._raised

    def _arrived(self, signum: int, _: object) -> None:
        if signum in _KEPT:
            self._came.append(signum)
        error: BaseException = DeadlinePassed(self._seconds)
        if signum in ENDING:
            self._asked = True
            error = Interrupted(signum)
        elif signum != signal.SIGALRM:
            return
        if self._raises:
            self._raises = False
            self._raised = error
            raise error

    def _give_back(self, signum: int, before: Any) -> None:
        """Once is enough: whoever was asked to end is about to."""
        signal.signal(signum, signal.SIG_IGN if self._asked else before)
