# SPDX-License-Identifier: Apache-2.0
"""Blocks: parts of memory layers that can be fetched, verified and used by themselves.

A block is a run of pieces of a layer, with their headers. The record has the digest of each block, its length
in the layer, and the ranges of files that it covers, its spans. Blocks follow each other from the layer's
first byte to its last, so lengths give the offsets. A page of a file is in the first block, in the order of
the layers, of which a span covers it, and a hole if there is none. docs/format.md describes the encoding.
"""

import base64
import bisect
import heapq
import itertools
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from oci.descriptor import Descriptor
from rekindle.errors import FormatError
from rekindle.files import PAGE_BYTES
from rekindle.record import StoredBlocks

DIGEST_BYTES = 32
_FIRST_BYTES = 1 << 20  # of a block that is needed first: what a page of it waits for
REST_BYTES = 2 << 20  # of a block of the rest: some pages of it are needed early after all
_EPOCH_BYTES = 16 << 20  # what is needed at about the same time is sorted by place
_GAP_PAGES = 4  # a gap that small costs less than another piece
_TABLE_LIMIT_BYTES = 64 << 20
_VARINT_BYTES = 10


class Span(NamedTuple):
    """Bytes `start` to `end` of a file, which has a number."""

    file: int
    start: int
    end: int


class Block(NamedTuple):
    """Bytes `offset` to `offset + length` of a layer, with their sha256 digest and what they cover."""

    layer: Descriptor
    offset: int
    length: int
    digest: bytes
    spans: tuple[Span, ...]


class BlockWriter:
    """Collects the blocks of one layer."""

    def __init__(self) -> None:
        self._digests: list[bytes] = []
        self._table = bytearray()
        self._file = self._page = 0

    def add(self, length: int, digest: bytes, spans: Sequence[Span]) -> None:
        """Add a block. Spans begin and end at pages."""
        self._digests.append(digest)
        for number in (length, len(spans)):
            self._put(number)
        for file, start, end in spans:
            first, last = start // PAGE_BYTES, -(-end // PAGE_BYTES)
            self._put(_unsigned(file - self._file))
            self._put(_unsigned(first - (self._page if file == self._file else 0)))
            self._put(last - first)
            self._file, self._page = file, last

    def _put(self, number: int) -> None:
        while number > 0x7F:
            self._table.append(number & 0x7F | 0x80)
            number >>= 7
        self._table.append(number)

    def stored(self, layer: Descriptor) -> StoredBlocks:
        """Return the blocks as the record has them."""
        return StoredBlocks(
            layer=layer.digest,
            digests=base64.b64encode(b"".join(self._digests)).decode(),
            table=base64.b64encode(zlib.compress(bytes(self._table), 9)).decode(),
        )


def read_blocks(stored: StoredBlocks, layer: Descriptor) -> list[Block]:
    """Return the blocks of a layer. Raises FormatError if they are malformed or do not make up the layer."""
    try:
        digests = base64.b64decode(stored.digests, validate=True)
        unpacker = zlib.decompressobj()
        table = unpacker.decompress(base64.b64decode(stored.table, validate=True), _TABLE_LIMIT_BYTES)
        if not unpacker.eof or len(digests) % DIGEST_BYTES:
            raise ValueError("it is truncated or too large")
        blocks = list(_read(table, digests, layer))
        if sum(block.length for block in blocks) != layer.size:
            raise ValueError("the blocks do not make up the layer")
    except (ValueError, zlib.error, IndexError) as error:
        raise FormatError(
            f"the record's blocks of layer {layer.digest} are malformed", cause=str(error)
        ) from None
    return blocks


def _read(table: bytes, digests: bytes, layer: Descriptor) -> Iterator[Block]:
    numbers = _numbers(table)

    def take() -> int:
        number = next(numbers, None)
        if number is None:
            raise ValueError("it ends too early")
        return number

    file = page = offset = 0
    for at in range(0, len(digests), DIGEST_BYTES):
        length, count = take(), take()
        spans = []
        for _ in range(count):
            before, file = file, file + _signed(take())
            first = _signed(take()) + (page if file == before else 0)
            page = first + take()
            if file < 0 or first < 0 or page <= first:
                raise ValueError("a span is not a range of a file")
            spans.append(Span(file, first * PAGE_BYTES, page * PAGE_BYTES))
        if not length:
            raise ValueError("a block is empty")
        yield Block(layer, offset, length, digests[at : at + DIGEST_BYTES], tuple(spans))
        offset += length
    if next(numbers, None) is not None:
        raise ValueError("it does not end after the last block")


def _numbers(table: bytes) -> Iterator[int]:
    at = 0
    while at < len(table):
        number = shift = 0
        while True:
            byte = table[at]
            at += 1
            number |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
            if shift >= 7 * _VARINT_BYTES:
                raise ValueError("a number is too large")
        yield number


def _unsigned(number: int) -> int:
    return number << 1 if number >= 0 else (-number << 1) - 1


def _signed(number: int) -> int:
    return -((number + 1) >> 1) if number & 1 else number >> 1


def first_needed(order: Iterable[Span]) -> Iterator[list[Span]]:
    """Yield the spans of blocks for what is needed first, in this order, without overlaps.

    `order` are pages as they were touched; one may come again. What is touched at about the same time is
    sorted by place, with small gaps filled.
    """
    taken: dict[int, bytearray] = {}
    epoch: list[Span] = []
    size = 0
    for span in order:
        epoch.append(span)
        size += span.end - span.start
        if size >= _EPOCH_BYTES:
            yield from _blocks_of(epoch, taken)
            epoch, size = [], 0
    yield from _blocks_of(epoch, taken)


def _blocks_of(epoch: Sequence[Span], taken: dict[int, bytearray]) -> Iterator[list[Span]]:
    block: list[Span] = []
    size = 0
    for span in _joined(epoch):
        for free in _take(span, taken.setdefault(span.file, bytearray())):
            start = free.start
            while start < free.end:
                end = min(free.end, start + _FIRST_BYTES - size)
                block.append(Span(free.file, start, end))
                size += end - start
                start = end
                if size >= _FIRST_BYTES:
                    yield block
                    block, size = [], 0
    if block:
        yield block


def _joined(epoch: Sequence[Span]) -> Iterator[Span]:
    before: Span | None = None
    for span in sorted(epoch):
        if before is None:
            before = span
        elif span.file == before.file and span.start <= before.end + _GAP_PAGES * PAGE_BYTES:
            before = Span(span.file, before.start, max(before.end, span.end))
        else:
            yield before
            before = span
    if before is not None:
        yield before


def _take(span: Span, taken: bytearray) -> Iterator[Span]:
    """Mark the pages of a span as taken, and yield the parts that were not."""
    first, last = span.start // PAGE_BYTES, -(-span.end // PAGE_BYTES)
    if len(taken) < last:
        taken.extend(bytes(last - len(taken)))
    at = first
    while (start := taken.find(0, at, last)) >= 0:
        end = taken.find(1, start, last)
        end = last if end < 0 else end
        taken[start:end] = b"\1" * (end - start)
        yield Span(span.file, start * PAGE_BYTES, end * PAGE_BYTES)
        at = end


def without(extents: Iterable[Span], taken: Iterable[Span]) -> Iterator[Span]:
    """Yield the parts of some sorted ranges that are in none of the others."""
    by_file: dict[int, list[Span]] = {}
    for span in sorted(taken):
        by_file.setdefault(span.file, []).append(span)
    for file, start, end in extents:
        others = by_file.get(file, [])
        for other in others[bisect.bisect_right(others, start, key=lambda each: each.end) :]:
            if other.start >= end:
                break
            if other.start > start:
                yield Span(file, start, other.start)
            start = max(start, other.end)
        if start < end:
            yield Span(file, start, end)


class BlockIndex:
    """Finds the block that a part of a file is in."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        spans: dict[int, list[tuple[int, int, int]]] = {}
        for number, block in enumerate(blocks):
            for span in block.spans:
                spans.setdefault(span.file, []).append((span.start, span.end, number))
        self._parts = {file: _flat(each) for file, each in spans.items()}
        self._ends = {file: [end for _, end, _ in parts] for file, parts in self._parts.items()}

    def between(self, file: int, start: int, end: int) -> set[int]:
        """Return the numbers of the blocks that bytes `start` to `end` of a file are in."""
        parts = self._parts.get(file, [])
        found = set()
        for at in range(bisect.bisect_right(self._ends.get(file, []), start), len(parts)):
            if parts[at][0] >= end:
                break
            found.add(parts[at][2])
        return found


def _flat(spans: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Return disjoint parts, (start, end, number), in order: where spans overlap, the least number has it."""
    spans = sorted(spans)
    points = sorted({point for start, end, _ in spans for point in (start, end)})
    active: list[tuple[int, int]] = []  # a heap of (number, end)
    parts: list[tuple[int, int, int]] = []
    at = 0
    for point, following in itertools.pairwise(points):
        while at < len(spans) and spans[at][0] == point:
            heapq.heappush(active, (spans[at][2], spans[at][1]))
            at += 1
        while active and active[0][1] <= point:
            heapq.heappop(active)
        if active:
            number = active[0][0]
            if parts and parts[-1][1:] == (point, number):
                point = parts.pop()[0]
            parts.append((point, following, number))
    return parts
