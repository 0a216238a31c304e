# SPDX-License-Identifier: Apache-2.0
"""Identify a large file by its size and by parts of it, since reading all of it would take too long.

The parts are the beginning, the end, and pages in between. For safetensors they are the header and a page in
the middle of each tensor: training changes every tensor that it trains nearly everywhere, and the header says
where each of them is. For other files the pages are at equal distances. So a file that was trained, quantized
or written anew has other parts. A change that touches none of the pages is missed: of a few rows in one
tensor, or of some bytes in another large file.
"""

import contextlib
import errno
import hashlib
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from rekindle.digest import Digest

WHOLE_BYTES = 1 << 20
"""Files up to this size are read whole."""
KEYED = "keyed:"
"""The beginning of a digest that only whoever has its key can compare with a guess."""

_EDGE_BYTES = 64 << 10
_PAGE_BYTES = 4096
_PAGES = 256
_TENSORS_LIMIT = 4096  # a header that names more is thinned out
_HEADER_LIMIT_BYTES = 32 << 20
# safetensors, "Format": a little-endian u64 with the length of a JSON object, which begins with `{`; offsets
# count from its end.
_OFFSETS = re.compile(rb'"data_offsets"\s*:\s*\[\s*(\d{1,18})\s*,\s*(\d{1,18})\s*\]')


def identity(path: str | Path) -> str:
    """Return `sha256:HEX` of a file that is small, `sampled:HEX` of a larger one.

    Raises OSError, also for what is not a regular file: nothing is waited for.
    """
    with _opened(path) as fd:
        size = os.fstat(fd).st_size
        if size <= WHOLE_BYTES:
            return Digest.of_hash(_whole(fd))
        hasher = hashlib.sha256(str(size).encode())
        for offset, length in _parts(fd, size):
            hasher.update(os.pread(fd, length, offset))
        return f"sampled:{hasher.hexdigest()}"


def keyed_identity(path: str | Path, key: bytes) -> str:
    """Return `keyed:HEX` of a small file. Raises OSError, also for a larger one."""
    with _opened(path) as fd:
        return KEYED + hashlib.blake2b(_content(fd), key=key, digest_size=32).hexdigest()


def short_digest(path: str) -> str:
    """Return the first 16 hex digits of a small file's sha256. Raises OSError, also for a larger one."""
    with _opened(path) as fd:
        return _whole(fd).hexdigest()[:16]


@contextlib.contextmanager
def _opened(path: str | Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        yield fd
    finally:
        os.close(fd)


def _whole(fd: int) -> "hashlib._Hash":
    return hashlib.sha256(_content(fd))


def _content(fd: int) -> bytes:
    content = os.read(fd, WHOLE_BYTES + 1)
    if len(content) > WHOLE_BYTES:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    return content


def _parts(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield the parts of a file to read as (offset, length)."""
    yield 0, _EDGE_BYTES
    yield max(0, size - _EDGE_BYTES), _EDGE_BYTES
    head = os.pread(fd, 9, 0)
    header = int.from_bytes(head[:8], "little")
    if head[8:] == b"{" and header <= min(size - 8, _HEADER_LIMIT_BYTES):
        yield 8, header
        tensors = [(int(m[1]), int(m[2])) for m in _OFFSETS.finditer(os.pread(fd, header, 8))]
        for start, end in tensors[:: len(tensors) // _TENSORS_LIMIT + 1]:
            yield 8 + header + (start + end) // 2, min(_PAGE_BYTES, max(0, end - (start + end) // 2))
        return
    step = size // _PAGES
    for number in range(_PAGES):
        yield number * step, _PAGE_BYTES
