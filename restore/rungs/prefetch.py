# SPDX-License-Identifier: Apache-2.0
"""The working set of a dump, read ahead while CRIU works: faults then find their pages in memory.

Without it each fault waits for the disk alone, and the OS kernel's own readahead, which cannot know what
comes next, brings nearly the whole file for the fifth of it that is touched.
"""

import contextlib
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from rekindle.record import StoredMemory

_PIECE_BYTES = 2 << 20  # what Linux reads ahead of one POSIX_FADV_WILLNEED at once


class Prefetch:
    """A context in which the working set is read into the page cache, largest file first, by threads of its
    own.

    What is there already costs next to nothing. It is only advice: a file that cannot be read ahead is not.
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
        self._over.set()

    def _read(self, path: Path, working_set: Sequence[tuple[int, int]]) -> None:
        with contextlib.suppress(OSError), open(path, "rb", buffering=0) as file:
            for offset, length in working_set:
                for at in range(offset, offset + length, _PIECE_BYTES):
                    if self._over.is_set():
                        return
                    size = min(_PIECE_BYTES, offset + length - at)
                    os.posix_fadvise(file.fileno(), at, size, os.POSIX_FADV_WILLNEED)
