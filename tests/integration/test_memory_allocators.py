# SPDX-License-Identifier: Apache-2.0
"""Allocators whose memory is mapped from a file halfway find in it what anonymous memory would hold.

They rely on what no test of single calls shows: that what they gave back is zeros when they take it again,
and that realloc may grow a block in its place. The program is tests/servers/allocate.c.
"""

import os
import shutil
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from rekindle.cell import MEMORY_PLACE, Cell, Command, MemoryFiles, Network
from tests.conftest import ALLOCATORS, SERVERS

pytestmark = [pytest.mark.criu, pytest.mark.allocators]

# Each gives memory back as soon as it can.
SETTINGS = {
    "glibc": {"MALLOC_MMAP_THRESHOLD_": "131072"},  # large blocks are mappings of their own
    "jemalloc": {
        "LD_PRELOAD": str(ALLOCATORS / "libjemalloc.so.2"),
        "MALLOC_CONF": "dirty_decay_ms:0,muzzy_decay_ms:0",
    },
    "mimalloc": {
        "LD_PRELOAD": str(ALLOCATORS / "libmimalloc.so.2.0"),
        "MIMALLOC_PAGE_RESET": "1",
        "MIMALLOC_RESET_DELAY": "0",
        "MIMALLOC_ABANDONED_PAGE_RESET": "1",
    },
    "tcmalloc": {
        "LD_PRELOAD": str(ALLOCATORS / "libtcmalloc_minimal.so.4"),
        "TCMALLOC_RELEASE_RATE": "10",
    },
}
EVERYWHERE = [(0x1000, 1 << 47)]  # the program maps what it has, wherever that is


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = next(name for name in ("cc", "gcc", "clang") if shutil.which(name))
    path = tmp_path_factory.mktemp("program") / "allocate"
    source = str(SERVERS / "allocate.c")
    subprocess.run([compiler, "-O1", "-Wall", "-Werror", "-o", path, source, "-pthread", "-ldl"], check=True)
    return path


@dataclass
class Run:
    """How the program ended, and what it printed."""

    status: int | None
    output: str
    errors: str


def run(program: Path, place: Path, allocator: str, *files: Path, memory: MemoryFiles | None = None) -> Run:
    output, errors = place / "output", place / "errors"
    output.write_bytes(b"")
    errors.write_bytes(b"")
    with Cell() as cell:
        cell.enter(Network.PRIVATE)
        command = Command(
            argv=[str(program), "7", *map(str, files)],
            env=SETTINGS[allocator],
            cwd=Path("/"),
            files={0: Path(os.devnull), 1: output, 2: errors},
            memory=memory,
        )
        status = cell.run(command, 100)
    return Run(status, output.read_text(), errors.read_text())


@pytest.mark.parametrize("allocator", SETTINGS)
def test_an_allocator_goes_on_as_it_would_have(program: Path, tmp_path: Path, allocator: str) -> None:
    plain = run(program, tmp_path, allocator)
    assert (plain.status, plain.errors) == (0, "")
    directory = tmp_path / "files"
    directory.mkdir()
    (directory / "1").touch()
    memory = MemoryFiles(directory=directory, ranges=EVERYWHERE)
    mapped = run(program, tmp_path, allocator, directory / "1", MEMORY_PLACE / "1", memory=memory)
    assert (mapped.status, mapped.output) == (0, plain.output), mapped.errors
    assert "areas are mapped" in mapped.errors
    assert (directory / "1").stat().st_blocks * 512 > 10 << 20


@pytest.mark.parametrize(
    ("allocator", "status", "said"),
    [("glibc", 128 + signal.SIGBUS, ""), ("jemalloc", 1, "not zeros")],
)
def test_without_the_filter_it_does_not(
    program: Path, tmp_path: Path, allocator: str, status: int, said: str
) -> None:
    """realloc runs past the file's end; jemalloc takes what it gave back for zeros."""
    (tmp_path / "1").touch()
    failed = run(program, tmp_path, allocator, tmp_path / "1", tmp_path / "1")
    assert failed.status == status, failed.errors
    assert said in failed.output
