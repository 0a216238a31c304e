# SPDX-License-Identifier: Apache-2.0
"""How far a transfer is: counted by who moves bytes, looked at by whoever wants to show it."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(slots=True, kw_only=True)
class Tally:
    """Bytes and blobs of one transfer. For many threads.

    `expected_bytes` is all that belongs to the images; of that, `reused_bytes` were there already.
    `fetched_bytes` and `sent_bytes` have come from and gone to registries so far, repetitions included.
    """

    expected_bytes: int = 0
    reused_bytes: int = 0
    fetched_bytes: int = 0
    sent_bytes: int = 0
    blobs: int = 0
    reused_blobs: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def expect(self, size: int) -> None:
        """One more blob belongs to it."""
        with self._lock:
            self.expected_bytes += size
            self.blobs += 1

    def reuse(self, size: int) -> None:
        """A blob is there already."""
        with self._lock:
            self.reused_bytes += size
            self.reused_blobs += 1

    def fetch(self, size: int) -> None:
        """So many bytes have come."""
        with self._lock:
            self.fetched_bytes += size

    def send(self, size: int) -> None:
        """So many bytes have gone."""
        with self._lock:
            self.sent_bytes += size


_SLICE_SECONDS = 0.25  # after at most so long, whoever waits sees that all is over


class Limiter:
    """Keeps all threads of a transfer together below a rate."""

    def __init__(self, bytes_per_second: float | None) -> None:
        self._rate = bytes_per_second
        self._lock = threading.Lock()
        self._next = 0.0

    def piece_bytes(self, most: int) -> int:
        """How much to move at once: no more than goes within a quarter of a second."""
        return most if self._rate is None else max(4096, min(most, int(self._rate / 4)))

    def wait(self, size: int, is_over: Callable[[], bool] = lambda: False) -> None:
        """Returns when so many bytes more may go, or when all is over."""
        if self._rate is None:
            return
        with self._lock:
            begin = max(time.monotonic(), self._next)
            self._next = begin + size / self._rate
        while (left := begin - time.monotonic()) > 0 and not is_over():
            time.sleep(min(left, _SLICE_SECONDS))
