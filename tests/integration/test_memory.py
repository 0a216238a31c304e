# SPDX-License-Identifier: Apache-2.0
"""Memory that is mapped from a file behaves as the anonymous memory that it was."""

import os
import sys
from pathlib import Path

import pytest

from rekindle.cell import MEMORY_PLACE, Cell, Command, MappingRefused, MemoryFiles, Network

pytestmark = pytest.mark.criu

PAGE = os.sysconf("SC_PAGE_SIZE")
START = 0x2000_0000_0000


def command(program: str, output: Path, memory: MemoryFiles | None) -> Command:
    return Command(
        argv=[sys.executable, "-I", "-S", "-c", program],
        env={},
        cwd=Path("/"),
        files={0: Path(os.devnull), 1: output, 2: output},
        memory=memory,
    )


@pytest.fixture
def memory(tmp_path: Path) -> MemoryFiles:
    directory = tmp_path / "memory"
    directory.mkdir()
    (directory / "1").write_bytes(b"x" * 16 * PAGE)
    return MemoryFiles(directory=directory, ranges=[(START, START + 16 * PAGE)])


DROP = f"""
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
fd = os.open("{MEMORY_PLACE}/1", os.O_RDONLY)
where = ctypes.c_void_p({START})
assert libc.mmap(where, ctypes.c_size_t({16 * PAGE}), 3, 0x12, fd, ctypes.c_long(0)) == {START}
assert libc.madvise(where, ctypes.c_size_t({PAGE}), 4) == 0
print(ctypes.string_at({START}, 1).hex(), ctypes.string_at({START + PAGE}, 1).hex())
"""


def test_dropped_pages_are_zeros(memory: MemoryFiles, tmp_path: Path) -> None:
    output = tmp_path / "output"
    with Cell() as cell:
        cell.enter(Network.PRIVATE)
        assert cell.run(command(DROP, output, memory), 30) == 0, output.read_text()
    assert output.read_text() == "00 78\n"


def test_memory_files_that_are_refused_leave_a_cell_that_goes_on(memory: MemoryFiles, tmp_path: Path) -> None:
    missing = MemoryFiles(directory=tmp_path / "missing", ranges=[])
    with Cell() as cell:
        cell.enter(Network.PRIVATE)
        with pytest.raises(MappingRefused, match="No such file"):
            cell.spawn(command("", tmp_path / "output", missing))
        assert os.listdir(cell.root / "dev/shm") == []
        assert cell.run(command("", tmp_path / "output", None), 30) == 0
        assert cell.run(command("", tmp_path / "output", memory), 30) == 0
