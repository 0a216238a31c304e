# SPDX-License-Identifier: Apache-2.0
"""Repeat what may succeed at another attempt, after pauses that grow."""

import random
import socket
import time
from collections.abc import Callable
from typing import TypeVar

from rekindle.config import RetryPolicy
from rekindle.errors import RekindleError

T = TypeVar("T")

RETRYABLE = frozenset({408, 429, 500, 502, 503, 504})
"""The statuses that another attempt may change."""

_PAUSES_GROW = 4
"""The number of failures after which the pauses between free attempts do not grow any more."""
_PROGRESS_BYTES = 16 << 10  # an attempt that brought as many bytes does not count against the policy


class ConnectTimeoutError(TimeoutError):
    """A host did not take the connection in time."""


class TryAgainError(ConnectionError):
    """An answer that asks for another attempt. `error` is what to raise if there is none."""

    def __init__(self, error: RekindleError, *, wait_seconds: float | None = None) -> None:
        super().__init__(error.cause or error.message)
        self.error = error
        self.wait_seconds = wait_seconds


def with_retries(
    attempt: Callable[[], T],
    policy: RetryPolicy,
    *,
    pause: Callable[[float], object],
    is_final: Callable[[OSError], bool] = lambda _: False,
    is_free: Callable[[OSError], bool] = lambda _: False,
    progress: Callable[[], int] = lambda: 0,
) -> T:
    """Return what `attempt` returns; call it again after an OSError, as often as the policy says.

    `pause` waits for so many seconds; what it raises ends the retries. `is_final` tells whether another
    attempt is pointless, `is_free` whether an error does not count against the policy. `progress` returns the
    bytes that all attempts have brought so far; the policy limits only attempts in a row without progress.
    The last error is raised unchanged.
    """
    failures, before = 0, 0
    while True:
        try:
            return attempt()
        except OSError as error:
            now = progress()
            failures = 1 if now >= before + _PROGRESS_BYTES else failures + 1
            before = now
            if is_final(error) or (failures >= policy.attempts and not is_free(error)):
                raise
            failures = min(failures, _PAUSES_GROW) if is_free(error) else failures
            asked = error.wait_seconds if isinstance(error, TryAgainError) else None
        pause(pause_seconds(policy, failures, asked))


def pause_seconds(policy: RetryPolicy, failures: int, asked: float | None = None) -> float:
    """Return how long to wait after so many failures in a row.

    It is cut by up to a half at random, so that clients which failed together do not come back together.
    `asked` is the least that the registry asks for; no pause is longer than the policy allows.
    """
    pause: float = policy.first_pause_seconds * 2 ** (failures - 1) * random.uniform(0.5, 1.0)  # noqa: S311
    return min(max(pause, asked or 0.0), policy.longest_wait_seconds)


def retry_after(header: str | None) -> float | None:
    """Return the seconds that a Retry-After header asks for, also if it is a date (RFC 9110)."""
    if header is None:
        return None
    if header.strip().isdecimal():
        return float(header.strip()[:12])
    import email.utils  # a date is rare, and this takes 10 ms

    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


def is_passing(error: OSError) -> bool:
    """Tell whether an error at the first contact with a host may pass.

    A name service may not be up yet when a container starts (EAI_AGAIN), and a host whose queue is full
    takes no connections for a while. A refused connection or an unknown name usually is a mistake.
    """
    if isinstance(error, socket.gaierror):
        return error.errno == socket.EAI_AGAIN
    passing = ConnectTimeoutError | ConnectionResetError | ConnectionAbortedError | TryAgainError
    return isinstance(error, passing)
