# SPDX-License-Identifier: Apache-2.0
"""Files of which nothing is in memory, and what of a file is."""

import ctypes
import mmap
import os
from pathlib import Path

import pytest

PAGE = 4096


def on_disk(path: Path, pages: int) -> Path:
    """Make a file that is on the disk alone."""
    path.write_bytes(os.urandom(pages * PAGE))
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if resident(path):
        pytest.skip("this file system keeps files in memory")
    return path


def resident(path: Path) -> list[int]:
    """The pages of a file that are in the page cache."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        found = (ctypes.c_ubyte * (len(mapped) // PAGE))()
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        assert libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(len(mapped)), found) == 0
        return [page for page, state in enumerate(found) if state & 1]


def nearly(path: Path, pages: range) -> bool:
    """Tell whether these pages of a file are in memory, and no others.

    Reading ahead is advice: short of memory, the OS kernel leaves out a page, or takes it back.
    """
    found = resident(path)
    return set(found) <= set(pages) and len(found) >= len(pages) * 0.9
