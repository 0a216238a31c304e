# SPDX-License-Identifier: Apache-2.0
"""A file is the one that a process has mapped, or it is said what is there instead."""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from rekindle.digest import Digest
from rekindle.node import elf, mapped, sampled
from rekindle.node.mapped import MappedFile, describe, describe_recorded, difference
from tests.samples.elf import elf_file, note

HOUR_NS = 3600 * 10**9


def library(build: int, *, data: int = 0) -> bytes:
    """An ELF file; all of them are equally long."""
    notes = note("<", b"GNU\0", 3, bytes([build] * 20))
    return elf_file(segments=[(4, 0x800, len(notes), 4)], content=notes + bytes([data] * 64))


def is_touched(path: Path) -> None:
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + HOUR_NS))


def rewritten(content: bytes) -> Callable[[Path], None]:
    def act(path: Path) -> None:
        path.write_bytes(content)
        is_touched(path)

    return act


def behind_a_link(path: Path) -> None:
    path.rename(path.with_name("real"))
    path.symlink_to("real")


def behind_a_newer_link(path: Path) -> None:
    behind_a_link(path)
    is_touched(path)


def is_a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def is_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def leads_in_a_circle(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def has_no_directory(path: Path) -> None:
    shutil.rmtree(path.parent)


def is_below_a_file(path: Path) -> None:
    shutil.rmtree(path.parent)
    path.parent.write_bytes(b"")


CASES: dict[str, tuple[bytes, Callable[[Path], object], str]] = {
    "a library as it was": (library(1), lambda _: None, ""),
    "a library of another time": (library(1), is_touched, ""),
    "a library of the same build, with other bytes": (library(1), rewritten(library(1, data=1)), ""),
    "a library of another build": (
        library(1),
        rewritten(library(2)),
        f"{len(library(2)):,} bytes, build-id:0202020202020202",
    ),
    "a library that is none any more": (
        library(1),
        rewritten(bytes(len(library(1)))),
        f"{len(library(1)):,} bytes, sha256:",
    ),
    "a longer library": (library(1), rewritten(library(1) + b"x"), f"{len(library(1)) + 1:,} bytes"),
    "data as it was": (b"data", lambda _: None, ""),
    "data of another time": (b"data", is_touched, ""),
    "data written again": (b"data", rewritten(b"data"), ""),
    "other data": (b"data", rewritten(b"else"), f"4 bytes, {Digest.of_bytes(b'else')[:25]}"),
    "more data": (b"data", rewritten(b"datas"), "5 bytes"),
    "no data any more": (b"data", rewritten(b""), "0 bytes"),
    "an empty file": (b"", is_touched, ""),
    "behind a link": (b"data", behind_a_link, ""),
    "behind a link, of another time": (b"data", behind_a_newer_link, ""),
    "gone": (b"data", Path.unlink, "missing"),
    "gone with its directory": (b"data", has_no_directory, "missing"),
    "gone with its directory, which is a file": (b"data", is_below_a_file, "missing"),
    "a directory": (b"data", is_a_directory, "not a regular file"),
    "a pipe": (b"data", is_a_pipe, "not a regular file"),
    "a link in a circle": (b"data", leads_in_a_circle, "Too many levels of symbolic links"),
}


@pytest.mark.parametrize(("content", "act", "wanted"), CASES.values(), ids=CASES)
def test_a_file_is(content: bytes, act: Callable[[Path], object], wanted: str, tmp_path: Path) -> None:
    path = tmp_path / "lib/file"
    path.parent.mkdir()
    path.write_bytes(content)
    file = describe(str(path))
    assert file is not None
    assert difference(file) == ""
    act(path)
    found = difference(file)
    assert found.startswith(wanted) if wanted.endswith(":") else found == wanted


def test_a_file_is_described(tmp_path: Path) -> None:
    path = tmp_path / "libx.so"
    path.write_bytes(library(7))
    assert describe(str(path)) == MappedFile(
        path=str(path),
        size=len(library(7)),
        mtime_ns=path.stat().st_mtime_ns,
        identity=f"build-id:{'07' * 20}",
    )
    path.write_bytes(b"data")
    file = describe(str(path))
    assert file is not None
    assert file.identity == Digest.of_bytes(b"data")


def test_what_is_no_plain_file_is_not_described(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "file").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe")
    for name in ("", "nothing", "link", "pipe", "file/below"):
        assert describe(str(tmp_path / name)) is None
    assert describe("/dev/null") is None


def test_the_program_that_runs_this_is_what_it_is() -> None:
    program = Path(sys.executable).resolve()
    file = describe(str(program))
    assert file is not None
    build_id = elf.build_id(program)
    assert file.identity == (f"build-id:{build_id}" if build_id else Digest.of_file(program))
    assert difference(structs.replace(file, mtime_ns=0)) == ""


def test_a_file_that_may_not_be_read_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"data")
    file = describe(str(path))
    assert file is not None
    is_touched(path)

    def refuse(*_: object) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(mapped, "_identity", refuse)
    assert difference(file) == "Permission denied"
    unread = describe(str(path))
    assert unread is not None
    assert unread.identity == ""


def test_what_is_too_large_is_known_by_parts_of_it(tmp_path: Path) -> None:
    path = tmp_path / "large"
    with open(path, "wb") as file:
        file.truncate(mapped._HASHED_BYTES + 1)
    large = describe(str(path))
    assert large is not None
    assert large.identity.startswith("sampled:")
    is_touched(path)
    assert difference(large) == ""
    status = path.stat()
    with open(path, "r+b") as file:
        file.seek(status.st_size - 1)
        file.write(b"1")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert difference(large) == f"{status.st_size:,} bytes, {sampled.identity(path)[:25]}"
    assert difference(structs.replace(large, identity="")) == "", "an older record tells no more"
    os.truncate(path, mapped._HASHED_BYTES)
    assert difference(large) == f"{mapped._HASHED_BYTES:,} bytes"


def test_a_record_that_lies_about_a_large_file_makes_nobody_read_it(tmp_path: Path) -> None:
    path = tmp_path / "large"
    with open(path, "wb") as file:
        file.truncate(1 << 40)
    lie = MappedFile(path=str(path), size=1 << 40, identity=Digest.of_bytes(b""))
    assert difference(lie).startswith(f"{1 << 40:,} bytes, sampled:")


def test_a_file_in_words() -> None:
    file = MappedFile(path="/x", size=1234567, identity="build-id:" + "ab" * 20)
    assert describe_recorded(file) == "1,234,567 bytes, build-id:abababababababab"
    assert describe_recorded(structs.replace(file, identity="")) == "1,234,567 bytes"


NAMES = st.sampled_from(["/", "//", "/proc/self/mem", "/dev/zero", "/a\0b", "/\ud800", "", "x" * 5000])


@given(
    path=NAMES | st.text(max_size=20),
    size=st.integers(0, 1 << 62),
    mtime_ns=st.integers(),
    identity=st.text(max_size=5),
)
def test_no_record_breaks_the_look(path: str, size: int, mtime_ns: int, identity: str) -> None:
    there = difference(MappedFile(path=path, size=size, mtime_ns=mtime_ns, identity=identity)) == ""
    assert not there or Path(path).is_file()


def test_a_file_of_the_kernel_must_only_be_there() -> None:
    described = describe("/sys/kernel/mm/transparent_hugepage/enabled")
    assert described is not None
    assert not described.identity
    assert not difference(described)
    assert difference(structs.replace(described, path="/sys/kernel/none")) == "missing"
