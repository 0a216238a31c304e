# SPDX-License-Identifier: Apache-2.0
"""What is packed is what is unpacked; what was not packed by us is refused."""

import contextlib
import hashlib
import io
import os
import random
import resource
import socket
import stat
import struct
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from oci import media_types
from oci.descriptor import Descriptor
from oci.dump_layers import PIECE_BYTES, pack, read_pieces, unpack
from oci.layout import Layout
from rekindle import dump_tree
from rekindle.digest import Digest
from rekindle.errors import FormatError, IntegrityError
from rekindle.record import FileKind
from tests.samples.gauges import Unseekable, memory_peak, writable_up_to
from tests.samples.record import stored

HEADER = struct.Struct("<IIIIQQ")
MAGIC = 0x184D2A5E
NOISE = random.Random(0).randbytes(1 << 20)


def compressed(content: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=1).compress(content)


def piece(file: int, offset: int, content: bytes, **lies: int) -> bytes:
    """A piece as it should be, but for the fields of its header that lie."""
    frame = compressed(content)
    fields = {
        "magic": MAGIC,
        "content_bytes": HEADER.size - 8,
        "file": file,
        "compressed": len(frame),
        "offset": offset,
        "length": len(content),
        **lies,
    }
    return HEADER.pack(*fields.values()) + frame


def put(layout: Layout, content: bytes) -> Descriptor:
    return layout.put(content, media_types.DUMP_LAYER)


def content_of(layout: Layout, layer: Descriptor) -> bytes:
    with layout.open_blob(layer) as file:
        return file.read()


def headers(content: bytes) -> Iterator[tuple[int, int, int]]:
    """The (file, offset, length) of each piece of a layer."""
    at = 0
    while at < len(content):
        magic, size, file, length_compressed, offset, length = HEADER.unpack_from(content, at)
        assert (magic, size) == (MAGIC, HEADER.size - 8)
        yield file, offset, length
        at += HEADER.size + length_compressed


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout.create(tmp_path / "layout")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """An empty dump."""
    root = tmp_path / "source"
    for directory in (root, root / "criu", root / "shm"):
        directory.mkdir(mode=0o700)
    return root


@pytest.fixture
def target(tmp_path: Path) -> Path:
    root = tmp_path / "target"
    root.mkdir()
    return root


def describe(root: Path) -> dict[str, tuple[object, ...]]:
    """All that a restore depends on, by path."""
    found: dict[str, tuple[object, ...]] = {}
    for directory, names, files in os.walk(root):
        for name in [*names, *files]:
            path = Path(directory, name)
            status = path.lstat()
            content: object = None
            if path.is_symlink():
                content = os.readlink(path)
            elif stat.S_ISREG(status.st_mode):
                content = hashlib.sha256(path.read_bytes()).hexdigest()
            found[str(path.relative_to(root))] = (
                status.st_mode,
                status.st_uid,
                status.st_gid,
                status.st_mtime_ns,
                status.st_nlink if stat.S_ISREG(status.st_mode) else 0,
                content,
            )
    del found["criu"], found["shm"]
    return found


def fill(root: Path) -> None:
    """One of everything that a dump may hold."""
    (root / "criu/empty.img").write_bytes(b"")
    (root / "criu/core-7.img").write_bytes(b"small")
    (root / "criu/pages-1.img").write_bytes(NOISE + bytes(PIECE_BYTES) + NOISE[:12345])
    (root / "criu/pages-2.img").write_bytes(NOISE * 9)
    with open(root / "criu/sparse.img", "wb") as file:
        file.truncate(40 << 20)
        file.seek(20 << 20)
        file.write(b"in the middle")
    (root / "criu/zeros.img").write_bytes(bytes(10_000))
    (root / "shm/deep/er").mkdir(parents=True)
    (root / "shm/empty").mkdir(mode=0o500)
    (root / "shm/deep/er/odd").write_bytes(NOISE[: PIECE_BYTES // 8 + 1])
    os.link(root / "shm/deep/er/odd", root / "shm/another-name")
    os.link(root / "shm/deep/er/odd", root / "shm/deep/third-name")
    (root / "shm/link").symlink_to("/nowhere/at/all")
    (root / "shm/link-to-directory").symlink_to("deep")
    os.mkfifo(root / "shm/fifo", 0o622)
    (root / "shm/b\udcffd name\n").write_bytes(b"x")
    (root / "shm/setuid").write_bytes(b"x")
    (root / "shm/setuid").chmod(0o4755)
    (root / "shm/read-only").write_bytes(b"x")
    (root / "shm/read-only").chmod(0o400)
    for number, (directory, names, files) in enumerate(os.walk(root, topdown=False)):
        for name in [*files, *names]:
            time_ns = (1_000_000_000 + number) * 1_000_000_000 + len(name)
            os.utime(Path(directory, name), ns=(time_ns, time_ns), follow_symlinks=False)


def test_a_tree_comes_back_as_it_was(source: Path, target: Path, layout: Layout) -> None:
    fill(source)
    files = dump_tree.scan(source)
    layers = pack(source, files, layout, workers=2)
    unpack(layout, layers, files, target, workers=2)
    assert describe(target) == describe(source)
    assert os.path.samefile(target / "shm/another-name", target / "shm/deep/er/odd")
    assert (target / "criu/sparse.img").stat().st_blocks < 100


def test_every_kind_of_file_is_found(source: Path) -> None:
    fill(source)
    kinds = {str(file.path): file.kind for file in dump_tree.scan(source)}
    assert kinds["shm/deep"] is FileKind.DIRECTORY
    assert kinds["shm/fifo"] is FileKind.FIFO
    assert kinds["shm/link-to-directory"] is FileKind.SYMLINK
    odd = {"shm/another-name", "shm/deep/er/odd", "shm/deep/third-name"}
    assert sorted(kinds[name] for name in odd) == [FileKind.FILE, FileKind.HARDLINK, FileKind.HARDLINK]


def test_sockets_are_left_out(source: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(source / "shm/socket"))
    assert dump_tree.scan(source) == []


def test_an_empty_tree_has_no_layer(source: Path, target: Path, layout: Layout) -> None:
    assert pack(source, dump_tree.scan(source), layout, workers=1) == []
    assert unpack(layout, [], [], target, workers=1) == 0
    assert describe(target) == {}


@pytest.mark.parametrize(
    "size", [1, 4095, 4096, 4097, PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1, 3 * PIECE_BYTES + 17]
)
def test_files_of_every_size_come_back(source: Path, target: Path, layout: Layout, size: int) -> None:
    content = (NOISE * (size // len(NOISE) + 1))[:size]
    (source / "criu/file").write_bytes(content)
    files = dump_tree.scan(source)
    written = unpack(layout, pack(source, files, layout, workers=1), files, target, workers=1)
    assert (target / "criu/file").read_bytes() == content
    assert written == size


def test_zero_pieces_are_not_stored(source: Path, target: Path, layout: Layout) -> None:
    content = bytes(3 * PIECE_BYTES + 100)
    (source / "criu/zeros").write_bytes(content)
    files = dump_tree.scan(source)
    layers = pack(source, files, layout, workers=1)
    assert [layer.size for layer in layers] == [0]
    assert unpack(layout, layers, files, target, workers=1) == 0
    assert (target / "criu/zeros").read_bytes() == content


def test_zeros_around_a_piece_are_not_stored(source: Path, layout: Layout) -> None:
    content = bytearray(PIECE_BYTES)
    content[5 * 4096 : 5 * 4096 + 3] = b"abc"
    content[9 * 4096] = 1
    (source / "criu/file").write_bytes(content)
    (layer,) = pack(source, dump_tree.scan(source), layout, workers=1)
    assert list(headers(content_of(layout, layer))) == [(0, 5 * 4096, 5 * 4096)]


def test_holes_are_not_read(source: Path, layout: Layout) -> None:
    with open(source / "criu/file", "wb") as file:
        file.truncate(1 << 40)
    assert pack(source, dump_tree.scan(source), layout, workers=1) == []


def test_equal_trees_have_equal_digests(tmp_path: Path, source: Path, layout: Layout) -> None:
    fill(source)
    first = pack(source, dump_tree.scan(source), layout, workers=1)
    again = pack(source, dump_tree.scan(source), Layout.create(tmp_path / "other"), workers=4)
    assert again == first


def test_metadata_pages_and_shared_memory_are_layers_of_their_own(source: Path, layout: Layout) -> None:
    fill(source)
    files = dump_tree.scan(source)
    for layer in pack(source, files, layout, workers=2):
        paths = {str(files[file].path) for file, _, _ in headers(content_of(layout, layer))}
        match layer.annotations["vnd.rekindle.role"]:
            case "metadata":
                assert paths == {"criu/core-7.img", "criu/sparse.img"}
            case "pages":
                assert paths == {"criu/pages-1.img", "criu/pages-2.img"}
            case "shm":
                assert all(path.startswith("shm/") for path in paths)
            case other:
                pytest.fail(other)


def test_many_pages_are_many_layers(
    source: Path, target: Path, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("oci.dump_layers._LAYER_BYTES", PIECE_BYTES)
    (source / "criu/pages-1.img").write_bytes(NOISE * 13)
    files = dump_tree.scan(source)
    layers = pack(source, files, layout, workers=2)
    assert len(layers) == 4
    unpack(layout, layers, files, target, workers=2)
    assert describe(target) == describe(source)


def test_any_zstd_reader_can_decompress_a_layer(source: Path, layout: Layout) -> None:
    (source / "criu/pages-1.img").write_bytes(NOISE * 5)
    (layer,) = pack(source, dump_tree.scan(source), layout, workers=1)
    stream = io.BytesIO(content_of(layout, layer))
    with zstandard.ZstdDecompressor().stream_reader(stream, read_across_frames=True) as reader:
        assert reader.read() == NOISE * 5


def test_a_blob_is_named_by_its_digest(source: Path, layout: Layout) -> None:
    fill(source)
    for layer in pack(source, dump_tree.scan(source), layout, workers=2):
        assert Digest.of_bytes(content_of(layout, layer)) == layer.digest


def test_a_file_that_shrinks_meanwhile_stops_the_packing(source: Path, tmp_path: Path) -> None:
    class Meddling(Layout):
        def staging(self):  # type: ignore[no-untyped-def]
            os.truncate(source / "criu/file", 5)
            return super().staging()

    layout = Meddling.create(tmp_path / "layout")
    (source / "criu/file").write_bytes(NOISE)
    with pytest.raises(IntegrityError, match="criu/file changed"):
        pack(source, dump_tree.scan(source), layout, workers=1)
    assert not list((layout.root / "blobs/sha256").iterdir())


def test_packing_and_unpacking_take_bounded_memory(source: Path, target: Path, layout: Layout) -> None:
    for number in range(1, 9):
        (source / f"criu/pages-{number}.img").write_bytes(NOISE * 16)
    files = dump_tree.scan(source)
    with memory_peak() as packing:
        layers = pack(source, files, layout, workers=2)
    with memory_peak() as unpacking:
        unpack(layout, layers, files, target, workers=2)
    assert packing[0] < 64 << 20
    assert unpacking[0] < 64 << 20


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


@pytest.mark.parametrize("act", ["pack", "unpack"])
def test_a_layer_of_many_files_needs_few_descriptors(
    source: Path, target: Path, layout: Layout, act: str
) -> None:
    for number in range(300):
        (source / f"criu/core-{number}.img").write_bytes(b"x")
    files = dump_tree.scan(source)
    with few_descriptors(100 if act == "pack" else 4096):
        layers = pack(source, files, layout, workers=1)
    with few_descriptors(100):
        unpack(layout, layers, files, target, workers=1)


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


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 40), st.binary(min_size=1, max_size=9000)), max_size=6))
def test_sparse_files_come_back(tmp_path: Path, writes: list[tuple[int, bytes]]) -> None:
    with tempfile.TemporaryDirectory(dir=tmp_path) as name:
        root = Path(name)
        source, target = root / "source", root / "target"
        for directory in (source, source / "criu", source / "shm", target):
            directory.mkdir()
        with open(source / "shm/file", "wb") as file:
            file.truncate(1 << 20)
            for page, content in writes:
                os.pwrite(file.fileno(), content, page * 4096 * 5 + page)
        layout, files = Layout.create(root / "layout"), dump_tree.scan(source)
        unpack(layout, pack(source, files, layout, workers=1), files, target, workers=1)
        assert (target / "shm/file").read_bytes() == (source / "shm/file").read_bytes()


def descriptor(content: bytes) -> Descriptor:
    digest = Digest.of_bytes(content)
    return Descriptor(media_type=media_types.DUMP_LAYER, digest=digest, size=len(content))


def read(stream: Unseekable, layer: Descriptor, target: Path) -> int:
    if not (target / "criu").exists():
        dump_tree.make(ONE_FILE, target)
    return read_pieces(stream, layer, ONE_FILE, target, threading.Event())


@contextlib.contextmanager
def few_descriptors(count: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(count, before[1]), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
