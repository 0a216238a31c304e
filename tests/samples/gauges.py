# SPDX-License-Identifier: Apache-2.0
"""A disk that runs full, a stream in pieces, and how much memory something takes."""

import contextlib
import io
import re
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def writable_up_to(size: int) -> Iterator[None]:
    """Within the block, files take bytes up to an offset, and a write over it is a short one.

    A disk that runs full does the same.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def memory_peak() -> Iterator[list[int]]:
    """How many bytes more the process held at the most within the block than before it: the one item."""
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    before = _status_bytes("VmRSS")
    peak: list[int] = []
    yield peak
    peak.append(_status_bytes("VmHWM") - before)


def _status_bytes(name: str) -> int:
    match = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert match
    return int(match[1]) * 1024


class Unseekable(io.RawIOBase):
    """A stream that gives its bytes in pieces of at most `chunk` bytes, as a socket does."""

    def __init__(self, content: bytes, chunk: int) -> None:
        self._content = io.BytesIO(content)
        self._chunk = chunk

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._content.readinto(memoryview(buffer)[: self._chunk])
