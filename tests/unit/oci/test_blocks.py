# SPDX-License-Identifier: Apache-2.0
"""Blocks: each can be fetched and checked alone, and together they are the layer."""

import base64
import hashlib
import itertools
import zlib
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oci.blocks import Block, BlockIndex, BlockWriter, Span, first_needed, read_blocks, without
from oci.descriptor import Descriptor
from oci.dump_layers import pack_layers, unpack
from oci.frames import PIECE_BYTES
from oci.layout import Layout
from rekindle import dump_tree
from rekindle.digest import Digest
from rekindle.errors import FormatError
from rekindle.record import StoredBlocks
from tests.samples.layers import HEADER, NOISE

PAGE = 4096
LAYER = Descriptor(media_type="x", digest=Digest.of_bytes(b"layer"), size=0)


@pytest.fixture
def dump(tmp_path: Path) -> Path:
    """A dump with two memory files, 12 MiB of data and a hole."""
    root = tmp_path / "dump"
    for top in ("criu", "memory", "shm"):
        (root / top).mkdir(mode=0o700, parents=True)
    (root / "criu/mm-7.img").write_bytes(b"mm")
    with open(root / "memory/7", "wb") as file:
        file.write(NOISE[: 1 << 20] * 8)
        file.seek(32 << 20)
        file.write(b"\1" * (2 << 20))
    (root / "memory/9").write_bytes(NOISE[: 2 << 20])
    return root


def spans_of(number: int, *pages: int) -> list[Span]:
    return [Span(number, page * PAGE, (page + 1) * PAGE) for page in pages]


def test_what_was_touched_first_comes_first_and_each_block_stands_alone(dump: Path, tmp_path: Path) -> None:
    layout = Layout.create(tmp_path / "layout")
    files = dump_tree.scan(dump)
    seven, nine = (n for n, file in enumerate(files) if file.path.name in {"7", "9"})
    order = [*spans_of(nine, 100, 101), *spans_of(seven, 8192 + 5), *spans_of(nine, 3, 100)]
    packed = pack_layers(dump, files, layout, workers=2, order=order)
    assert [each.descriptor.annotations["vnd.rekindle.role"] for each in packed] == ["metadata", "memory"]
    metadata, memory = packed
    assert metadata.blocks is None
    assert memory.blocks is not None
    with layout.open_blob(memory.descriptor) as stream:
        content = stream.read()
    blocks = read_blocks(memory.blocks, memory.descriptor)
    assert [block.offset for block in blocks] == list(
        itertools.accumulate((block.length for block in blocks[:-1]), initial=0)
    )
    for block in blocks:
        part = content[block.offset : block.offset + block.length]
        assert hashlib.sha256(part).digest() == block.digest
    assert blocks[0].spans == (
        *spans_of(seven, 8192 + 5),
        *spans_of(nine, 3),
        Span(nine, 100 * PAGE, 102 * PAGE),
    )
    _, _, number, _, offset, _ = HEADER.unpack_from(content)
    assert (number, offset) == (seven, (8192 + 5) * PAGE)
    assert blocks[0].length < 4 * (PAGE + HEADER.size) + 64, "no more than what was touched"
    index = BlockIndex(blocks)
    assert index.between(nine, 100 * PAGE, 101 * PAGE) == {0}
    assert 0 not in index.between(nine, 102 * PAGE, 110 * PAGE)
    assert index.between(seven, 16 << 20, 17 << 20) == set(), "a hole is in no block"
    target = tmp_path / "target"
    target.mkdir()
    layers = [each.descriptor for each in packed]
    unpack(layout, layers, files, target, workers=2)
    for name in ("7", "9"):
        assert (target / "memory" / name).read_bytes() == (dump / "memory" / name).read_bytes()


def test_without_an_order_the_same_files_come_out(dump: Path, tmp_path: Path) -> None:
    layout = Layout.create(tmp_path / "layout")
    files = dump_tree.scan(dump)
    packed = pack_layers(dump, files, layout, workers=1)
    (memory,) = (each for each in packed if each.blocks)
    assert memory.blocks is not None
    blocks = read_blocks(memory.blocks, memory.descriptor)
    assert all(sum(end - start for _, start, end in block.spans) <= PIECE_BYTES for block in blocks)
    found = BlockIndex(blocks)
    for number, file in enumerate(files):
        if file.path.parts[0] == "memory":
            assert found.between(number, 0, 1), file


def test_the_description_of_a_gigabyte_is_small() -> None:
    writer = BlockWriter()
    for block in range(256):
        writer.add(
            1_000_000, hashlib.sha256(bytes([block])).digest(), [Span(3, block << 22, (block + 1) << 22)]
        )
    stored = writer.stored(LAYER)
    assert len(stored.digests) + len(stored.table) < 13_000


_lengths = st.integers(1, 1 << 40)
_ranges = st.tuples(st.integers(0, 50), st.integers(0, 1 << 30), st.integers(1, 1 << 20))


@given(st.lists(st.tuples(_lengths, st.lists(_ranges, max_size=5)), max_size=20))
def test_what_is_written_is_read(given: list[tuple[int, list[tuple[int, int, int]]]]) -> None:
    writer, expected, offset = BlockWriter(), [], 0
    layer = msgspec.structs.replace(LAYER, size=sum(length for length, _ in given))
    for number, (length, ranges) in enumerate(given):
        spans = tuple(Span(file, first * PAGE, (first + count) * PAGE) for file, first, count in ranges)
        digest = hashlib.sha256(str(number).encode()).digest()
        writer.add(length, digest, spans)
        expected.append(Block(layer, offset, length, digest, spans))
        offset += length
    assert read_blocks(writer.stored(layer), layer) == expected


def stored(table: bytes, blocks: int = 1) -> StoredBlocks:
    return StoredBlocks(
        layer=LAYER.digest,
        digests=base64.b64encode(bytes(32 * blocks)).decode(),
        table=base64.b64encode(zlib.compress(table)).decode(),
    )


@pytest.mark.parametrize(
    "wrong",
    [
        stored(b""),
        stored(b"\5\0", blocks=2),
        stored(b"\5\0\0"),
        stored(b"\0\0"),
        stored(b"\4\0"),
        stored(b"\5\1\0\0\0"),
        stored(b"\5\1\1\0\1"),
        stored(b"\5\1\0\1\1"),
        stored(b"\5\x81"),
        stored(b"\x85" + b"\x80" * 20 + b"\0\0"),
        stored(bytes(70 << 20)),
        msgspec.structs.replace(stored(b"\5\0"), digests="AAAA"),
        msgspec.structs.replace(stored(b"\5\0"), digests="*"),
        msgspec.structs.replace(stored(b"\5\0"), table="AAAA"),
        msgspec.structs.replace(stored(b"\5\0"), table="\xe4"),
    ],
)
def test_a_malformed_description_is_refused(wrong: StoredBlocks) -> None:
    layer = msgspec.structs.replace(LAYER, size=5)
    assert len(read_blocks(stored(b"\5\0"), layer)) == 1
    with pytest.raises(FormatError, match="malformed"):
        read_blocks(wrong, layer)


_pages = st.tuples(st.integers(0, 2), st.integers(0, 60), st.integers(1, 6)).map(
    lambda each: Span(each[0], each[1] * PAGE, (each[1] + each[2]) * PAGE)
)


def pages_of(spans: list[Span]) -> list[tuple[int, int]]:
    return [(file, page) for file, start, end in spans for page in range(start // PAGE, end // PAGE)]


@given(st.lists(_pages, max_size=30))
def test_each_page_that_was_touched_is_in_one_block(order: list[Span]) -> None:
    found = pages_of([span for block in first_needed(order) for span in block])
    assert len(found) == len(set(found))
    assert set(found) >= set(pages_of(order))


@given(st.lists(_pages, max_size=10), st.lists(_pages, max_size=10))
def test_the_rest_is_what_was_not_taken(extents: list[Span], taken: list[Span]) -> None:
    found = pages_of(list(without(sorted(extents), taken)))
    assert set(found) == set(pages_of(extents)) - set(pages_of(taken))


@given(st.lists(st.lists(_pages, max_size=6), max_size=6), st.integers(0, 2), st.integers(0, 70))
def test_a_page_is_in_the_first_block_that_covers_it(spans: list[list[Span]], file: int, page: int) -> None:
    blocks = [Block(LAYER, 0, 1, b"", tuple(each)) for each in spans]
    covering = [n for n, each in enumerate(spans) if (file, page) in pages_of(each)]
    found = BlockIndex(blocks).between(file, page * PAGE, (page + 1) * PAGE)
    assert found == set(covering[:1])
