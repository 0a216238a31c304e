# SPDX-License-Identifier: Apache-2.0
"""The progress of a transfer: counted by the threads that move bytes, read by whoever shows it."""

import threading
import time
from collections.abc import Callable

from msgspec import Struct, field


class Tally(Struct, kw_only=True):
    """The bytes and blobs of one transfer. Thread-safe.

    `expected_bytes` is the size of the images; `reused_bytes` of that were there already. `fetched_bytes` and
    `sent_bytes` were received from and sent to registries so far, retries included.
    """

    expected_bytes: int = 0
    reused_bytes: int = 0
    fetched_bytes: int = 0
    sent_bytes: int = 0
    blobs: int = 0
    reused_blobs: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def expect(self, size: int) -> None:
        """Count a blob of this size as part of the transfer."""
        with self._lock:
            self.expected_bytes += size
            self.blobs += 1

    def reuse(self, size: int) -> None:
        """Count a blob that was there already."""
        with self._lock:
            self.reused_bytes += size
            self.reused_blobs += 1

    def fetch(self, size: int) -> None:
        """Count bytes that were received."""
        with self._lock:
            self.fetched_bytes += size

    def send(self, size: int) -> None:
        """Count bytes that were sent."""
        with self._lock:
            self.sent_bytes += size


_SLICE_SECONDS = 0.25  # how long a waiting thread may take to notice that the transfer was aborted


class Limiter:
    """Keep all threads of a transfer together below a rate."""

    def __init__(self, bytes_per_second: float | None) -> None:
        self._rate = bytes_per_second
        self._lock = threading.Lock()
        self._next = 0.0

    def piece_bytes(self, most: int) -> int:
        """Return how much to move at once: at most a quarter of a second's worth."""
        return most if self._rate is None else max(4096, min(most, int(self._rate / 4)))

    def wait(self, size: int, is_over: Callable[[], bool] = lambda: False) -> None:
        """Wait until `size` more bytes may be moved, or until the transfer is aborted."""
        if self._rate is None:
            return
        with self._lock:
            begin = max(time.monotonic(), self._next)
            self._next = begin + size / self._rate
        while (left := begin - time.monotonic()) > 0 and not is_over():
            time.sleep(min(left, _SLICE_SECONDS))
