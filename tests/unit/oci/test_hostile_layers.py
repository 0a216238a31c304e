# SPDX-License-Identifier: Apache-2.0
"""A layer that lies is refused, whatever it holds, and leaves nothing that could be taken for a dump."""

import contextlib
import io
import os
import struct
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from oci import media_types
from oci.descriptor import Descriptor
from oci.dump_layers import read_pieces, unpack
from oci.frames import PIECE_BYTES
from oci.layout import Layout
from rekindle import dump_tree
from rekindle.digest import Digest
from rekindle.errors import FormatError, IntegrityError
from rekindle.record import FileKind
from tests.samples.gauges import Unseekable, memory_peak, writable_up_to
from tests.samples.layers import HEADER, MAGIC, NOISE, compressed, piece, put
from tests.samples.record import stored

ONE_FILE = [stored("criu/file", size=2 * PIECE_BYTES), stored("criu/sub", FileKind.DIRECTORY, mode=0o700)]


PIECE = " ".join(map(str, range(9999))).encode()[:5000]


def endless_zeros(size: int, *, write_content_size: bool = True) -> bytes:
    out = io.BytesIO()
    compressor = zstandard.ZstdCompressor(level=1, write_content_size=write_content_size)
    with compressor.stream_writer(out, size=size if write_content_size else -1, closefd=False) as writer:
        block = bytes(1 << 20)
        for _ in range(size >> 20):
            writer.write(block)
    return out.getvalue()


def framed(frame: bytes, length: int, offset: int = 0) -> bytes:
    return HEADER.pack(MAGIC, HEADER.size - 8, 0, len(frame), offset, length) + frame


def lying_bomb() -> bytes:
    """A frame of 1 GiB whose own header says 4 MiB."""
    frame = bytearray(endless_zeros(1 << 30))
    parameters = zstandard.get_frame_parameters(bytes(frame))
    assert parameters.content_size == 1 << 30
    at = frame.index(struct.pack("<I", 1 << 30))
    assert at < 8
    frame[at : at + 4] = struct.pack("<I", PIECE_BYTES)
    assert zstandard.frame_content_size(bytes(frame)) == PIECE_BYTES
    return bytes(frame)


def lying_frame(size: int) -> bytes:
    """A frame of 5000 bytes that says another number of them."""
    frame = bytearray(compressed(PIECE))
    frame[5:7] = struct.pack("<H", size - 256)
    assert zstandard.frame_content_size(bytes(frame)) == size
    return bytes(frame)


def broken_frame() -> bytes:
    frame = bytearray(compressed(PIECE))
    frame[4 + 1 + 2] |= 0b110  # behind magic, descriptor and size: the first block's type
    return bytes(frame)


HOSTILE: dict[str, Callable[[], bytes]] = {
    "another magic": lambda: piece(0, 0, PIECE, magic=0x184D2A50),
    "a zstd frame without a header": lambda: compressed(NOISE),
    "text": lambda: b"#!/bin/sh\nexec evil, and some more of it\n",
    "a header of another size": lambda: piece(0, 0, PIECE, content_bytes=25),
    "a file that is not there": lambda: piece(2, 0, PIECE),
    "the last file there can be": lambda: piece((1 << 32) - 1, 0, PIECE),
    "a piece of a directory": lambda: piece(1, 0, PIECE),
    "a piece over the file's end": lambda: piece(0, 2 * PIECE_BYTES - 4999, PIECE),
    "an offset of 16 EiB": lambda: piece(0, (1 << 64) - 1, PIECE),
    "a piece of nothing": lambda: piece(0, 0, b""),
    "a piece of more than 4 MiB": lambda: piece(0, 0, NOISE * 5),
    "a length of 16 EiB": lambda: piece(0, 0, PIECE, length=(1 << 64) - 1),
    "a length less than the content": lambda: piece(0, 0, PIECE, length=4999),
    "a length more than the content": lambda: piece(0, 0, PIECE, length=5001),
    "a frame of no bytes": lambda: HEADER.pack(MAGIC, 24, 0, 0, 0, 1) + bytes(64),
    "a frame of 4 GiB": lambda: piece(0, 0, PIECE, compressed=(1 << 32) - 1),
    "a frame that says less of itself": lambda: (
        piece(0, 0, PIECE, compressed=len(compressed(PIECE)) - 1) + piece(0, 0, PIECE)
    ),
    "a skippable frame for a frame": lambda: framed(struct.pack("<II", MAGIC, 4) + b"abcd", 4),
    "a frame without its size": lambda: framed(endless_zeros(PIECE_BYTES, write_content_size=False), 1 << 22),
    "a frame with a block of no known type": lambda: framed(broken_frame(), len(PIECE)),
    "a bomb": lambda: framed(endless_zeros(1 << 30), PIECE_BYTES),
    "a bomb of unknown size": lambda: framed(endless_zeros(1 << 30, write_content_size=False), PIECE_BYTES),
    "a bomb that lies about its size": lambda: framed(lying_bomb(), PIECE_BYTES),
    "a frame that says too little of its content": lambda: framed(lying_frame(4999), 4999),
    "a frame that says too much of its content": lambda: framed(lying_frame(5001), 5001),
    "40 bytes behind the last frame": lambda: piece(0, 0, PIECE) + bytes(40),
    "cut off in a header": lambda: piece(0, 0, PIECE)[: HEADER.size - 1],
    "cut off in a frame": lambda: piece(0, 0, PIECE)[:-1],
    "cut off after a header": lambda: piece(0, 0, PIECE)[: HEADER.size],
    "a few bytes behind the last frame": lambda: piece(0, 0, PIECE) + b"more",
    "a byte behind a frame": lambda: framed(compressed(PIECE) + b"x", len(PIECE)),
    "bytes behind a frame": lambda: framed(compressed(PIECE) + b"more", len(PIECE)),
    "a frame behind a frame": lambda: framed(compressed(PIECE) * 2, len(PIECE)),
    "a piece behind a frame": lambda: framed(compressed(PIECE) + piece(0, 0, PIECE), len(PIECE)),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_a_layer_that_lies_is_malformed(layout: Layout, target: Path, content: Callable[[], bytes]) -> None:
    layer = put(layout, content())
    with memory_peak() as peak, pytest.raises(FormatError, match=layer.digest):
        unpack(layout, [layer], ONE_FILE, target, workers=1)
    assert peak[0] < 40 << 20


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_other_bytes_than_the_digest_says_are_damage(
    layout: Layout, target: Path, content: Callable[[], bytes]
) -> None:
    spoiled = content()
    layer = structs.replace(put(layout, b"whole"), size=len(spoiled))
    (layout.root / "blobs/sha256" / layer.digest.hex).write_bytes(spoiled)
    with pytest.raises(IntegrityError, match=layer.digest):
        unpack(layout, [layer], ONE_FILE, target, workers=1)


@pytest.mark.parametrize("change", [-1, 1])
def test_a_blob_of_another_size_is_damage(layout: Layout, target: Path, change: int) -> None:
    layer = put(layout, piece(0, 0, PIECE))
    os.truncate(layout.root / "blobs/sha256" / layer.digest.hex, layer.size + change)
    with pytest.raises(IntegrityError, match=str(layer.size)):
        unpack(layout, [layer], ONE_FILE, target, workers=1)


def test_a_missing_blob_is_damage(layout: Layout, target: Path) -> None:
    layer = put(layout, piece(0, 0, PIECE))
    (layout.root / "blobs/sha256" / layer.digest.hex).unlink()
    with pytest.raises(IntegrityError, match="missing"):
        unpack(layout, [layer], ONE_FILE, target, workers=1)


def test_a_stream_longer_than_its_descriptor_is_damage(target: Path) -> None:
    content = piece(0, 0, PIECE)
    with pytest.raises(IntegrityError, match="longer"):
        read(Unseekable(content + b"x", 1000), descriptor(content), target)


@pytest.mark.parametrize("chunk", [1, 31, 1000, 1 << 20])
def test_a_stream_may_come_in_pieces_of_any_size(target: Path, chunk: int) -> None:
    content = piece(0, 0, PIECE) + piece(0, PIECE_BYTES, PIECE)
    assert read(Unseekable(content, chunk), descriptor(content), target) == 2 * len(PIECE)
    with open(target / "criu/file", "rb") as file:
        assert file.read(len(PIECE)) == PIECE
        file.seek(PIECE_BYTES)
        assert file.read(len(PIECE)) == PIECE


def test_a_stream_that_ends_early_is_damage(target: Path) -> None:
    content = piece(0, 0, PIECE) + piece(0, PIECE_BYTES, PIECE)
    for length in range(0, len(content), 97):
        with pytest.raises(IntegrityError):
            read(Unseekable(content[:length], 4096), descriptor(content), target)


def test_the_first_failure_stops_the_other_layers(layout: Layout, target: Path) -> None:
    good = put(layout, b"".join(piece(0, 0, NOISE) for _ in range(64)))
    hostile = put(layout, piece(9, 0, PIECE))
    with pytest.raises(FormatError, match=hostile.digest):
        unpack(layout, [hostile, *[good] * 50], ONE_FILE, target, workers=1)


def test_a_disk_that_runs_full_is_no_success(target: Path) -> None:
    content = piece(0, 0, PIECE)
    dump_tree.make(ONE_FILE, target)
    with writable_up_to(4000), pytest.raises(OSError):
        read(Unseekable(content, 4096), descriptor(content), target)


SMALL = b"".join(piece(0, number * 9000, PIECE[number:]) for number in range(4))


@given(st.integers(0, len(SMALL) - 1), st.integers(1, 255))
def test_a_changed_byte_is_damage(layout: Layout, position: int, change: int) -> None:
    spoiled = bytearray(SMALL)
    spoiled[position] ^= change
    layer = put(layout, SMALL)
    (layout.root / "blobs/sha256" / layer.digest.hex).write_bytes(spoiled)
    with tempfile.TemporaryDirectory(dir=layout.root) as tree, pytest.raises(IntegrityError):
        unpack(layout, [layer], ONE_FILE, Path(tree), workers=1)


@given(st.data())
def test_changed_bytes_under_a_right_digest_do_no_harm(layout: Layout, data: st.DataObject) -> None:
    spoiled = bytearray(SMALL)
    for _ in range(data.draw(st.integers(1, 3))):
        # Most of a layer is content: look at the headers more often than chance would.
        where = data.draw(st.one_of(st.integers(0, 60), st.integers(0, len(SMALL) - 1)))
        spoiled[where] ^= data.draw(st.integers(1, 255))
    layer = put(layout, bytes(spoiled))
    with tempfile.TemporaryDirectory(dir=layout.root) as name:
        tree = Path(name)
        with contextlib.suppress(FormatError, IntegrityError):
            unpack(layout, [layer], ONE_FILE, tree, workers=1)
        assert sorted(path.name for path in tree.rglob("*")) == ["criu", "file", "shm", "sub"]
        assert (tree / "criu/file").stat().st_size == ONE_FILE[0].size


@given(st.binary(max_size=300))
def test_random_bytes_under_a_right_digest_are_refused(layout: Layout, content: bytes) -> None:
    layer = put(layout, content)
    with (
        tempfile.TemporaryDirectory(dir=layout.root) as tree,
        contextlib.suppress(FormatError, IntegrityError),
    ):
        assert unpack(layout, [layer], ONE_FILE, Path(tree), workers=1) == 0
        assert content == b""


def descriptor(content: bytes) -> Descriptor:
    digest = Digest.of_bytes(content)
    return Descriptor(media_type=media_types.DUMP_LAYER, digest=digest, size=len(content))


def read(stream: Unseekable, layer: Descriptor, target: Path) -> int:
    if not (target / "criu").exists():
        dump_tree.make(ONE_FILE, target)
    return read_pieces(stream, layer, ONE_FILE, target, threading.Event())
