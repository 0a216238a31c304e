# SPDX-License-Identifier: Apache-2.0
"""The working set is read ahead, and no more; nothing that is missing keeps a restore from going on."""

from pathlib import Path, PurePosixPath

import pytest

from rekindle.record import StoredMemory
from restore.prefetch import Prefetch
from tests.conftest import wait_for
from tests.samples.page_cache import on_disk, resident

_PAGES = 4096  # 16 MiB, of which the OS kernel would read more than was asked for


@pytest.fixture(name="dump")
def _dump(tmp_path: Path) -> Path:
    """A dump whose memory is on the disk alone."""
    (tmp_path / "memory").mkdir()
    on_disk(tmp_path / "memory/7", _PAGES)
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
