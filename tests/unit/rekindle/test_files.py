# SPDX-License-Identifier: Apache-2.0
"""Files are whole or not there, locks hold, and copies keep what a file is."""

import errno
import os
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rekindle.errors import BusyError, SpaceError
from rekindle.files import (
    PAGE_BYTES,
    copy_sparse_tree,
    data_extents,
    locked,
    nonzero_runs,
    remove_tree,
    try_lock,
    write_atomically,
)
from rekindle.os_errors import naming_full_disk
from tests.samples.gauges import memory_peak, writable_up_to


def test_a_file_is_made(tmp_path: Path) -> None:
    write_atomically(tmp_path / "file", b"content", mode=0o600)
    assert (tmp_path / "file").read_bytes() == b"content"
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path) == ["file"]


def test_a_file_is_replaced_and_not_written_over(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with open(path, "rb") as reader:
        write_atomically(path, b"new content")
        assert reader.read() == b"old"
    assert path.read_bytes() == b"new content"


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"target")
    (tmp_path / "link").symlink_to("target")
    write_atomically(tmp_path / "link", b"new")
    assert (tmp_path / "target").read_bytes() == b"target"
    assert not (tmp_path / "link").is_symlink()


def test_a_failed_write_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with writable_up_to(1000), pytest.raises(OSError):
        write_atomically(path, b"x" * 5000)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_crash_leaves_the_old_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, step, fail) if step == "fsync" else patch.setattr(Path, step, fail)
        with pytest.raises(KeyboardInterrupt):
            write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_readers_see_the_old_content_or_the_new(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"0" * 100_000)
    seen: set[bytes] = set()
    over = threading.Event()

    def read() -> None:
        while not over.is_set():
            seen.add(path.read_bytes())

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(50):
        write_atomically(path, b"%d" % (number % 10) * 100_000)
    over.set()
    reader.join()
    assert all(len(content) == 100_000 and len(set(content)) == 1 for content in seen)


def test_two_writers_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    sync = os.fsync

    def meanwhile(fd: int) -> None:
        monkeypatch.setattr(os, "fsync", sync)
        write_atomically(path, b"the other's")
        sync(fd)

    monkeypatch.setattr(os, "fsync", meanwhile)
    write_atomically(path, b"ours")
    assert path.read_bytes() == b"ours"


def test_a_tree_is_removed_and_what_links_name_is_not(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/file").write_bytes(b"x")
    (tmp_path / "tree/sub").mkdir(parents=True)
    (tmp_path / "tree/link").symlink_to(tmp_path / "kept")
    (tmp_path / "tree/sub/file").write_bytes(b"x")
    remove_tree(tmp_path / "tree")
    remove_tree(tmp_path / "tree")
    assert (tmp_path / "kept/file").exists()
    assert os.listdir(tmp_path) == ["kept"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_named(tmp_path: Path, number: int) -> None:
    with pytest.raises(SpaceError, match=str(tmp_path)) as caught, naming_full_disk(tmp_path):
        raise OSError(number, os.strerror(number))
    assert os.strerror(number) in caught.value.cause


def test_another_failure_is_not_called_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), naming_full_disk(tmp_path):
        raise PermissionError(errno.EACCES, "no")


def test_a_lock_keeps_others_out(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with locked(path):
        with pytest.raises(BusyError, match=str(path)), locked(path, timeout=0.05):
            pytest.fail("two have it")
        with pytest.raises(BusyError), locked(path, shared=True, timeout=0):
            pytest.fail("two have it")
    with locked(path, timeout=0):
        pass


def test_a_shared_lock_keeps_owners_out_only(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with locked(path, shared=True), locked(path, shared=True, timeout=0), pytest.raises(BusyError):
        locked(path, timeout=0).__enter__()


def test_a_lock_is_given_back_by_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), locked(tmp_path / "lock"):
        raise ZeroDivisionError
    with locked(tmp_path / "lock", timeout=0):
        pass


def test_a_lock_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    got = threading.Event()

    def take() -> None:
        with locked(path, timeout=30):
            got.set()

    with locked(path):
        waiter = threading.Thread(target=take)
        waiter.start()
        assert not got.wait(0.1)
    assert got.wait(10)
    waiter.join()


def test_a_killed_owner_has_no_lock(tmp_path: Path) -> None:
    program = (
        "import sys, time, pathlib; from rekindle.files import locked\n"
        "with locked(pathlib.Path(sys.argv[1])):\n print('have', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as owner:
        assert owner.stdout
        assert owner.stdout.readline() == b"have\n"
        fd = os.open(tmp_path / "lock", os.O_RDWR)
        try:
            assert not try_lock(fd)
            owner.kill()
            owner.wait()
            assert try_lock(fd, timeout=10)
        finally:
            os.close(fd)


def test_a_lock_file_is_private(tmp_path: Path) -> None:
    with locked(tmp_path / "lock"):
        assert (tmp_path / "lock").stat().st_mode & 0o777 == 0o600


def test_a_lock_is_not_inherited(tmp_path: Path) -> None:
    with locked(tmp_path / "lock"):
        fds = [int(fd) for fd in os.listdir("/proc/self/fd") if Path(f"/proc/self/fd/{fd}").exists()]
        held = [fd for fd in fds if os.path.realpath(f"/proc/self/fd/{fd}") == str(tmp_path / "lock")]
        assert held
        assert not any(os.get_inheritable(fd) for fd in held)


def sparse(path: Path, size: int, *writes: tuple[int, bytes]) -> None:
    with open(path, "wb") as file:
        file.truncate(size)
        for offset, content in writes:
            os.pwrite(file.fileno(), content, offset)


@pytest.mark.parametrize(
    ("size", "writes", "wanted"),
    [
        (0, [], []),
        (1 << 20, [], []),
        (1 << 20, [(0, b"x" * 4096)], [(0, 4096)]),
        (1 << 20, [(8192, b"x" * 4096), (65536, b"x" * 8192)], [(8192, 4096), (65536, 8192)]),
        (5000, [(0, b"x" * 5000)], [(0, 5000)]),
    ],
)
def test_holes_are_passed_over(
    tmp_path: Path, size: int, writes: list[tuple[int, bytes]], wanted: list[tuple[int, int]]
) -> None:
    sparse(tmp_path / "file", size, *writes)
    with open(tmp_path / "file", "rb") as file:
        assert list(data_extents(file.fileno(), size)) == wanted


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.mkdir()
    return path


@pytest.fixture
def target(tmp_path: Path) -> Path:
    path = tmp_path / "target"
    path.mkdir()
    return path


def blocks(path: Path) -> int:
    return path.stat().st_blocks * 512


def test_holes_stay_holes(source: Path, target: Path) -> None:
    sparse(source / "file", 64 << 20, (5 << 20, b"here"), (63 << 20, b"there"))
    written = copy_sparse_tree(source, target)
    assert (target / "file").read_bytes() == (source / "file").read_bytes()
    assert written <= 3 * PAGE_BYTES
    assert blocks(target / "file") <= 1 << 20


def test_zeros_become_holes(source: Path, target: Path) -> None:
    (source / "file").write_bytes(bytes(4 << 20) + b"x")
    assert copy_sparse_tree(source, target) == 1
    assert (target / "file").read_bytes() == bytes(4 << 20) + b"x"
    assert blocks(target / "file") <= 64 << 10


def test_hard_links_stay_one_file(source: Path, target: Path) -> None:
    (source / "a").mkdir()
    (source / "one").write_bytes(b"x")
    os.link(source / "one", source / "a/two")
    os.link(source / "one", source / "three")
    assert copy_sparse_tree(source, target) == 1
    assert (target / "one").stat().st_nlink == 3
    assert os.path.samefile(target / "one", target / "a/two")


def test_links_fifos_and_directories_are_copied(source: Path, target: Path) -> None:
    (source / "empty").mkdir()
    (source / "dangling").symlink_to("/no/where")
    (source / "up").symlink_to("..")
    os.mkfifo(source / "fifo")
    copy_sparse_tree(source, target)
    assert (target / "empty").is_dir()
    assert os.readlink(target / "dangling") == "/no/where"
    assert os.readlink(target / "up") == ".."
    assert stat.S_ISFIFO((target / "fifo").lstat().st_mode)


def test_sockets_are_left_out(source: Path, target: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(source / "socket"))
    (source / "file").write_bytes(b"x")
    copy_sparse_tree(source, target)
    assert os.listdir(target) == ["file"]


def attributes(path: Path) -> tuple[int, int, int, int]:
    status = path.lstat()
    return status.st_mode, status.st_uid, status.st_gid, status.st_mtime_ns


@pytest.mark.parametrize("kind", ["file", "link", "fifo", "directory"])
def test_modes_and_times_are_kept(source: Path, target: Path, kind: str) -> None:
    path = source / kind
    make: dict[str, Callable[[], object]] = {
        "file": lambda: path.write_bytes(b"x"),
        "link": lambda: path.symlink_to("x"),
        "fifo": lambda: os.mkfifo(path),
        "directory": path.mkdir,
    }
    make[kind]()
    if kind == "directory":
        (path / "file").write_bytes(b"x")
    if kind != "link":
        path.chmod(0o2751)
    os.utime(path, ns=(1_000_000_001, 2_000_000_002), follow_symlinks=False)
    copy_sparse_tree(source, target)
    assert attributes(target / kind) == attributes(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_owners_are_kept(source: Path, target: Path) -> None:
    (source / "file").write_bytes(b"x")
    os.chown(source / "file", 1234, 2345)
    (source / "file").chmod(0o4755)
    copy_sparse_tree(source, target)
    assert attributes(target / "file") == attributes(source / "file")


def test_a_short_write_is_made_up_for(source: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (source / "file").write_bytes(b"x" * 6000)
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, content, offset: pwrite(fd, content[:1000], offset))
    copy_sparse_tree(source, target)
    assert (target / "file").read_bytes() == b"x" * 6000


def test_copying_takes_bounded_memory(source: Path, target: Path) -> None:
    (source / "file").write_bytes(b"x" * (64 << 20))
    with memory_peak() as peak:
        copy_sparse_tree(source, target)
    assert peak[0] < 16 << 20


@pytest.mark.parametrize(
    ("content", "runs"),
    [
        (b"", []),
        (b"\0", []),
        (b"x", [(0, 1)]),
        (bytes(PAGE_BYTES), []),
        (bytes(PAGE_BYTES) + b"\0", []),
        (bytes(PAGE_BYTES) + b"\0x", [(PAGE_BYTES, PAGE_BYTES + 2)]),
        (b"x" + bytes(2 * PAGE_BYTES - 1) + b"x", [(0, PAGE_BYTES), (2 * PAGE_BYTES, 2 * PAGE_BYTES + 1)]),
    ],
)
def test_runs_of_pages_with_content(content: bytes, runs: list[tuple[int, int]]) -> None:
    assert list(nonzero_runs(content)) == runs


pages = st.sampled_from([bytes(PAGE_BYTES), b"x" * PAGE_BYTES, bytes(PAGE_BYTES - 1) + b"x"])
tails = st.sampled_from([b"", b"\0", b"\0x", b"x", bytes(PAGE_BYTES - 1)])


@given(st.lists(pages, max_size=12), tails)
def test_runs_are_what_is_not_zero(parts: list[bytes], tail: bytes) -> None:
    content = b"".join([*parts, tail])
    runs = list(nonzero_runs(content))
    rebuilt = bytearray(len(content))
    for start, end in runs:
        rebuilt[start:end] = content[start:end]
    assert bytes(rebuilt) == content
    edges = [edge for run in runs for edge in run]
    assert edges == sorted(set(edges))  # in order, not empty, and not touching: the longest runs
    assert all(edge % PAGE_BYTES == 0 for edge in edges[:-1])
    covered = {index for start, end in runs for index in range(start // PAGE_BYTES, -(-end // PAGE_BYTES))}
    assert covered == {index for index, part in enumerate([*parts, tail]) if any(part)}


@settings(max_examples=30)
@given(
    st.lists(st.tuples(st.integers(0, 300), st.binary(min_size=1, max_size=9000)), max_size=6),
    st.integers(0, 4095),
)
def test_any_sparse_file_is_copied(tmp_path: Path, writes: list[tuple[int, bytes]], odd: int) -> None:
    name = os.urandom(8).hex()
    source, target = tmp_path / f"{name}-source", tmp_path / f"{name}-target"
    source.mkdir()
    target.mkdir()
    sparse(
        source / "file", (1 << 20) + odd, *((page * PAGE_BYTES + odd, content) for page, content in writes)
    )
    copy_sparse_tree(source, target)
    assert (target / "file").read_bytes() == (source / "file").read_bytes()
