# SPDX-License-Identifier: Apache-2.0
"""Mapped memory without a pair to compare with: other file systems, code, and no filter."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rekindle.cell import MEMORY_PLACE, Cell, Command, MappingRefused, MemoryFiles, Network
from tests.samples.mapped_memory import AREAS, DONTNEED, MAYMOVE, actor, write_memory_file

pytestmark = pytest.mark.criu


def test_a_process_without_privileges_is_served(tmp_path: Path) -> None:
    directory = tmp_path / "files"
    write_memory_file(directory)
    with actor(directory, tmp_path / "log", supervised=True) as mapped:
        mapped.do("set", str(mapped.path), AREAS)
        mapped.do("become", 65534)
        assert mapped.do("advise", 4, 1, DONTNEED) == [0, 0]
        assert mapped.do("read", 4, 4) == "00000000"
        assert mapped.do("remap", 4, 1, 2, MAYMOVE) == [-1, errno.ENOMEM]


@pytest.mark.parametrize("kind", ["tmpfs", "overlay"])
def test_memory_files_may_be_on(kind: str, tmp_path: Path) -> None:
    """overlayfs tells other devices and inodes by stat than in /proc/PID/maps."""
    tops = [tmp_path / name for name in ("below", "above", "work", "files")]
    for top in tops:
        top.mkdir()
    below, above, work, directory = tops
    write_memory_file(below)
    options = f"lowerdir={below},upperdir={above},workdir={work}" if kind == "overlay" else "size=8m"
    subprocess.run(["mount", "-t", kind, "-o", options, "none", str(directory)], check=True)
    try:
        if kind == "tmpfs":
            write_memory_file(directory)
        with actor(directory, tmp_path / "log", supervised=True) as mapped:
            mapped.do("set", str(mapped.path), AREAS)
            mapped.do("write", 66, "mine")
            assert mapped.do("advise", 0, 80, DONTNEED) == [0, 0]
            for page in (0, 63, 66):
                assert mapped.do("read", page, 4) == "00000000"
            assert mapped.do("read", 96, 7) == b"page 80".hex()
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


CODE = {"x86_64": "b82a000000c3", "aarch64": "40058052c0035fd6"}  # return 42


def test_memory_can_be_made_code_although_its_files_are_on_a_noexec_mount(tmp_path: Path) -> None:
    directory = tmp_path / "noexec"
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "noexec", "none", str(directory)], check=True)
    try:
        write_memory_file(directory)
        with open(directory / "1", "r+b") as file:
            file.write(bytes.fromhex(CODE[os.uname().machine]))
        with actor(directory, tmp_path / "log", supervised=True) as mapped:
            mapped.do("set", str(mapped.path), AREAS)
            assert mapped.do("protect", 0, 4, 5) == [0, 0]
            assert mapped.do("call", 0) == 42
            (mount,) = (line for line in (cell_mounts(mapped.cell)) if line.split()[4] == str(MEMORY_PLACE))
            assert set(mount.split()[5].split(",")) >= {"ro", "nosuid", "nodev"}
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


def cell_mounts(cell: Cell) -> list[str]:
    return Path(f"/proc/{cell.init_pid}/mountinfo").read_text().splitlines()


def test_without_the_filter_the_files_bytes_come_back(tmp_path: Path) -> None:
    """The tests above would fail."""
    directory = tmp_path / "files"
    write_memory_file(directory)
    with actor(directory, tmp_path / "log", supervised=False) as unhelped:
        unhelped.do("set", str(unhelped.path), AREAS)
        unhelped.do("write", 4, "mine")
        assert unhelped.do("advise", 4, 1, DONTNEED) == [0, 0]
        assert bytes.fromhex(unhelped.do("read", 4, 6)) == b"page 4"
        assert unhelped.do("remap", 96, 32, 40, MAYMOVE) == [96, 0]
        beyond = [checksum for page, _, checksum in unhelped.do("look") if page >= 128]
        assert beyond == [-errno.EIO] * 8  # a touch is SIGBUS


def test_a_listener_that_another_has_is_a_reason_to_copy(tmp_path: Path) -> None:
    """As in a container whose runtime watches calls itself."""
    program = """
import ctypes, struct, sys
from pathlib import Path
from rekindle.cell import Cell, Command, MappingRefused, MemoryFiles, Network, memory
memory.install(struct.pack("HBBI", 6, 0, 0, 0x7fff0000))  # allows everything
with Cell() as cell:
    cell.enter(Network.PRIVATE)
    command = {"argv": ["true"], "env": {}, "cwd": Path("/")}
    try:
        cell.spawn(Command(**command, memory=MemoryFiles(directory=Path(sys.argv[1]), ranges=[])))
    except MappingRefused as refused:
        print(refused, [path.name for path in (cell.root / "dev/shm").iterdir()])
    print(cell.run(Command(**command), 30))
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines() == [
        "[Errno 16] seccomp filter with a listener: Device or resource busy []",
        "0",
    ]


def test_memory_files_that_are_refused_leave_a_cell_that_goes_on(tmp_path: Path) -> None:
    directory = tmp_path / "files"
    write_memory_file(directory)

    def command(memory: MemoryFiles | None) -> Command:
        return Command(argv=["true"], env={}, cwd=Path("/"), memory=memory)

    with Cell() as cell:
        cell.enter(Network.PRIVATE)
        before = cell_mounts(cell)
        with pytest.raises(MappingRefused, match="No such file"):
            cell.spawn(command(MemoryFiles(directory=tmp_path / "missing", ranges=[])))
        assert os.listdir(cell.root / "dev/shm") == []
        assert cell_mounts(cell) == before
        assert cell.run(command(None), 30) == 0
        assert cell.run(command(MemoryFiles(directory=directory, ranges=[])), 30) == 0
        with pytest.raises(MappingRefused, match="File exists"):
            cell.spawn(command(MemoryFiles(directory=directory, ranges=[])))
        assert cell.run(command(None), 30) == 0
