# SPDX-License-Identifier: Apache-2.0
"""Read the working set of a dump ahead, from the decision on, so that page faults find it in memory.

Otherwise each fault waits for the disk, and the OS kernel's own readahead, which cannot know the next page,
reads nearly the whole file for the fifth of it that is touched.
"""

import contextlib
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from rekindle.record import StoredMemory

_PIECE_BYTES = 2 << 20  # what Linux reads ahead at most for one POSIX_FADV_WILLNEED


class Prefetch:
    """A context in which threads read the working set into the page cache, largest file first.

    Pages that are there already cost next to nothing. Files that cannot be read, since the dump has yet to be
    unpacked or was removed, are skipped.
    """

    def __init__(self, dump: Path, memory: Sequence[StoredMemory]) -> None:
        self._over = threading.Event()
        self._threads = [
            threading.Thread(target=self._read, args=[dump / each.path, each.working_set], daemon=True)
            for each in sorted(memory, key=lambda each: each.data_bytes, reverse=True)
            if each.working_set
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Read no further. Idempotent."""
        self._over.set()

    def _read(self, path: Path, working_set: Sequence[tuple[int, int]]) -> None:
        with contextlib.suppress(OSError), open(path, "rb", buffering=0) as file:
            for offset, length in working_set:
                for at in range(offset, offset + length, _PIECE_BYTES):
                    if self._over.is_set():
                        return
                    size = min(_PIECE_BYTES, offset + length - at)
                    os.posix_fadvise(file.fileno(), at, size, os.POSIX_FADV_WILLNEED)
