# SPDX-License-Identifier: Apache-2.0
"""The working set is read ahead, and no more; nothing that is missing keeps a restore from going on."""

import ctypes
import mmap
import os
from pathlib import Path, PurePosixPath

import pytest

from rekindle.record import StoredMemory
from restore.prefetch import Prefetch
from tests.conftest import wait_for

_PAGES = 4096  # 16 MiB, of which the OS kernel would read more than was asked for


def resident(path: Path) -> list[int]:
    """The pages of a file that are in the page cache."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        found = (ctypes.c_ubyte * _PAGES)()
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        assert libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(len(mapped)), found) == 0
        return [page for page, state in enumerate(found) if state & 1]


@pytest.fixture(name="dump")
def _dump(tmp_path: Path) -> Path:
    """A dump whose memory is on the disk alone."""
    (tmp_path / "memory").mkdir()
    path = tmp_path / "memory/7"
    path.write_bytes(os.urandom(_PAGES * 4096))
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if resident(path):
        pytest.skip("this file system keeps files in memory")
    return tmp_path


def memory(*working_set: tuple[int, int], path: str = "memory/7") -> StoredMemory:
    return StoredMemory(
        path=PurePosixPath(path), data_bytes=_PAGES * 4096, ranges=((4096, 8192),), working_set=working_set
    )


def test_the_working_set_is_read_and_nothing_else(dump: Path) -> None:
    with Prefetch(dump, [memory((4096 * 10, 4096 * 3), (4096 * 1000, 4096 * 600))]):
        wait_for(lambda: len(resident(dump / "memory/7")) >= 603, 10)
    assert resident(dump / "memory/7") == [*range(10, 13), *range(1000, 1600)]


def test_files_that_are_missing_do_no_harm(dump: Path) -> None:
    with Prefetch(dump, [memory((0, 4096), path="memory/8"), memory((0, 4096))]):
        wait_for(lambda: resident(dump / "memory/7") == [0], 10)


def test_once_stopped_nothing_is_read(dump: Path) -> None:
    prefetch = Prefetch(dump, [memory((0, _PAGES * 4096))])
    prefetch.stop()
    with prefetch:
        pass
    for thread in prefetch._threads:
        thread.join()
    assert not resident(dump / "memory/7")
