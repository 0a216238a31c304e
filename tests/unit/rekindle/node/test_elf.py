# SPDX-License-Identifier: Apache-2.0
"""The build id of an ELF file is the one that readelf shows, and no file makes the reader raise or dawdle."""

import errno
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rekindle.node import elf
from rekindle.node.elf import build_id
from tests.samples.elf import elf_file, note

ID = bytes(range(20))
FORMS = [("<", False), (">", False), ("<", True), (">", True)]
EVERY_FORM = pytest.mark.parametrize(("order", "wide"), FORMS, ids=["32LE", "32BE", "64LE", "64BE"])
FAR = 1 << 20
HUGE = (1 << 64) - 8


def build_id_of(tmp_path: Path, content: bytes) -> str:
    path = tmp_path / "file"
    path.write_bytes(content)
    return build_id(path)


@EVERY_FORM
def test_a_segment_of_notes_has_it(tmp_path: Path, order: str, wide: bool) -> None:
    notes = note(order, b"GNU\0", 1, bytes(16)) + note(order, b"GNU\0", 3, ID)
    file = elf_file(
        order,
        wide=wide,
        segments=[(1, 0, 0x900, 0x1000), (4, 0x800, len(notes), 4), (6, 64, 64, 8)],
        content=notes,
    )
    assert build_id_of(tmp_path, file) == ID.hex()


@EVERY_FORM
def test_a_file_without_segments_has_it_in_a_section(tmp_path: Path, order: str, wide: bool) -> None:
    notes = note(order, b"GNU\0", 3, ID)
    file = elf_file(
        order, wide=wide, sections=[(0, 0, 0, 0), (1, 0x40, 8, 1), (7, 0x800, len(notes), 4)], content=notes
    )
    assert build_id_of(tmp_path, file) == ID.hex()


@EVERY_FORM
def test_headers_and_notes_may_lie_far_into_the_file(tmp_path: Path, order: str, wide: bool) -> None:
    notes = note(order, b"GNU\0", 3, ID)  # as patchelf leaves them, in libraries of wheels
    file = elf_file(
        order,
        wide=wide,
        segments=[(4, 2 * FAR, len(notes), 4)],
        content=notes,
        content_at=2 * FAR,
        headers_at=FAR,
    )
    assert build_id_of(tmp_path, file) == ID.hex()


@pytest.mark.parametrize("pad", [4, 8])
def test_notes_are_padded_as_their_segment_says(tmp_path: Path, pad: int) -> None:
    notes = b"".join(
        note("<", name, kind, content, pad=pad)
        for name, kind, content in [(b"Go\0\0", 4, b"abc"), (b"stapsdt\0", 3, bytes(5)), (b"GNU\0", 3, ID)]
    )
    file = elf_file(segments=[(4, 0x800, len(notes), pad)], content=notes)
    assert build_id_of(tmp_path, file) == ID.hex()


@pytest.mark.parametrize("length", [1, 8, 16, 32, 64])
def test_an_id_has_the_length_that_its_linker_chose(tmp_path: Path, length: int) -> None:
    notes = note("<", b"GNU\0", 3, b"\xab" * length)
    file = elf_file(segments=[(4, 0x800, len(notes), 4)], content=notes)
    assert build_id_of(tmp_path, file) == "ab" * length


@pytest.mark.parametrize(
    "notes",
    [
        b"",
        note("<", b"GNU\0", 1, ID),
        note("<", b"Go\0\0", 3, ID),
        note("<", b"GNU\0", 3, b""),
        note("<", b"GNU\0", 3, bytes(65)),
        note("<", b"GNU\0", 3, ID)[:-1],
        struct.pack("<3I", 0xFFFF_FFFF, 0xFFFF_FFFF, 3) + b"GNU\0" + ID,
        note(">", b"GNU\0", 3, ID),
    ],
    ids=["none", "another type", "another name", "empty", "too long", "cut off", "lies", "other order"],
)
def test_what_is_no_build_id_is_none(tmp_path: Path, notes: bytes) -> None:
    places = [(4, 0x800, len(notes), 4)]
    sections = [(7, 0x800, len(notes), 4)]
    assert build_id_of(tmp_path, elf_file(segments=places, sections=sections, content=notes)) == ""


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x7fEL",
        b"#!/bin/sh\n",
        b"\x7fELF",
        b"\x7fELF\3\1\1" + bytes(100),
        b"\x7fELF\2\3\1" + bytes(100),
        elf_file()[:60],
        elf_file(),
        elf_file(segments=[(4, HUGE, 0x1000, 4), (4, 0x800, HUGE, 4), (4, HUGE, HUGE, HUGE)]),
        elf_file(sections=[(7, HUGE, 0x1000, 4), (7, 0x800, HUGE, 4)], headers_at=0x700),
        elf_file(segments=[(4, 0x800, 64, 4)], segment_bytes=1, segment_count=0xFFFF),
        elf_file(segments=[(4, 0x800, 64, 4)], segment_count=0xFFFF, section_count=0xFFFF),
    ],
)
def test_what_is_malformed_has_none(tmp_path: Path, content: bytes) -> None:
    assert build_id_of(tmp_path, content) == ""


def test_a_table_at_the_end_of_the_address_space_has_none(tmp_path: Path) -> None:
    file = bytearray(elf_file(segments=[(4, 0x800, 64, 4)], sections=[(7, 0x800, 64, 4)]))
    file[32:48] = struct.pack("<QQ", HUGE, HUGE)
    assert build_id_of(tmp_path, bytes(file)) == ""


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The length of each read from here on."""
    lengths: list[int] = []
    pread = os.pread

    def counted(fd: int, length: int, offset: int) -> bytes:
        lengths.append(length)
        return pread(fd, length, offset)

    monkeypatch.setattr(os, "pread", counted)
    return lengths


def test_a_usual_file_is_read_once(tmp_path: Path, reads: list[int]) -> None:
    notes = note("<", b"GNU\0", 3, ID)
    file = elf_file(segments=[(4, 0x800, len(notes), 4)], content=notes) + bytes(FAR)
    assert build_id_of(tmp_path, file) == ID.hex()
    assert len(reads) == 1


def test_a_hostile_file_costs_little(
    tmp_path: Path, reads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = 0
    notes = elf._notes

    def counted(piece: bytes, align: int, form: struct.Struct) -> list[tuple[bytes, int, bytes]]:
        nonlocal seen
        found = list(notes(piece, align, form))
        seen += len(found)
        return found

    monkeypatch.setattr(elf, "_notes", counted)
    empty = note("<", b"", 0, b"") * 100_000
    places = [(4, 0x200000, len(empty), 4)] * 10_000
    sections = [(7, 0x200000, len(empty), 4)] * 10_000
    file = elf_file(segments=places, sections=sections, content=empty, content_at=0x200000)
    assert build_id_of(tmp_path, file) == ""
    assert sum(reads) < 2 << 20
    assert len(reads) < 100
    assert seen < 20_000


@given(data=st.data())
def test_a_broken_file_has_some_id_or_none(
    tmp_path_factory: pytest.TempPathFactory, reads: list[int], data: st.DataObject
) -> None:
    order, wide = data.draw(st.sampled_from(FORMS))
    notes = note(order, b"GNU\0", 1, bytes(16)) + note(order, b"GNU\0", 3, ID)
    whole = elf_file(
        order,
        wide=wide,
        segments=[(4, 0x200, len(notes), 4)],
        sections=[(7, 0x200, len(notes), 4)],
        content=notes,
        content_at=0x200,
    )
    broken = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    places = st.integers(0, max(len(broken) - 1, 0))
    for place, byte in data.draw(st.lists(st.tuples(places, st.integers(0, 255)), max_size=6)):
        if broken:
            broken[place] = byte
    reads.clear()
    found = build_id_of(tmp_path_factory.getbasetemp(), bytes(broken))
    assert re.fullmatch(r"([0-9a-f]{2}){0,64}", found)
    assert sum(reads) < 2 << 20


def shared_objects(count: int) -> list[Path]:
    """Some of the system's and of Python's own, the same each time."""
    places = [Path("/usr/lib"), Path("/usr/lib64"), Path(sysconfig.get_path("platstdlib"))]
    found = {path.resolve() for place in places for path in place.glob("**/*.so*") if path.is_file()}
    real = sorted(path for path in found if os.access(path, os.R_OK) and ".so" in path.name)
    return random.Random(7).sample(real, min(count, len(real)))


def test_it_is_what_readelf_shows() -> None:
    readelf = shutil.which("readelf")
    files = [Path(sys.executable).resolve(), *shared_objects(60)]
    if readelf is None or len(files) < 5:
        pytest.skip("this test needs readelf, of binutils, and shared objects")
    for path in files:
        shown = subprocess.run(
            [readelf, "-n", path], capture_output=True, text=True, check=False, timeout=60
        ).stdout
        ids = re.findall(r"Build ID: ([0-9a-f]+)", shown)
        assert build_id(path) == (ids[0] if ids else ""), path


def test_a_damaged_library_has_some_id_or_none(tmp_path: Path, reads: list[int]) -> None:
    libraries = shared_objects(8)
    if not libraries:
        pytest.skip("this test needs shared objects")
    damage = random.Random(11)
    for library in libraries:
        with open(library, "rb") as file:
            whole = file.read(1 << 16)
        for _ in range(100):
            broken = bytearray(whole[: damage.randrange(1, len(whole) + 1)])
            for _ in range(damage.randrange(20)):
                near = damage.choice([64, 1024, len(broken)])  # most of what is read is at the front
                broken[damage.randrange(min(near, len(broken)))] ^= 1 << damage.randrange(8)
            reads.clear()
            assert re.fullmatch(r"([0-9a-f]{2}){0,64}", build_id_of(tmp_path, bytes(broken)))
            assert sum(reads) < 2 << 20


def test_what_cannot_be_opened_raises(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        build_id(tmp_path / "nothing")
    (tmp_path / "link").symlink_to(sys.executable)
    with pytest.raises(OSError) as caught:
        build_id(tmp_path / "link")
    assert caught.value.errno == errno.ELOOP


def test_what_is_no_plain_file_has_none(tmp_path: Path) -> None:
    assert build_id(tmp_path) == ""
    os.mkfifo(tmp_path / "pipe")
    assert build_id(tmp_path / "pipe") == ""  # without waiting for a writer
    assert build_id(Path("/dev/null")) == ""


def test_no_descriptor_is_left(tmp_path: Path) -> None:
    before = os.listdir("/proc/self/fd")
    build_id_of(tmp_path, b"\x7fELF")
    build_id(Path(sys.executable).resolve())
    assert os.listdir("/proc/self/fd") == before


def test_a_read_that_fails_finds_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(fd: int, length: int, offset: int) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pread", failing)
    assert build_id_of(tmp_path, elf_file()) == ""
