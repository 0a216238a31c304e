# SPDX-License-Identifier: Apache-2.0
"""What is packed is what is unpacked; what was not packed by us is refused."""

import contextlib
import hashlib
import io
import os
import resource
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from oci.descriptor import Descriptor
from oci.dump_layers import pack, unpack
from oci.frames import PIECE_BYTES
from oci.layout import Layout
from rekindle import dump_tree
from rekindle.digest import Digest
from rekindle.errors import IntegrityError
from rekindle.record import FileKind
from tests.samples.gauges import memory_peak
from tests.samples.layers import HEADER, MAGIC, NOISE


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
def source(tmp_path: Path) -> Path:
    """An empty dump."""
    root = tmp_path / "source"
    for directory in (root, root / "criu", root / "shm"):
        directory.mkdir(mode=0o700)
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


@contextlib.contextmanager
def few_descriptors(count: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(count, before[1]), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
