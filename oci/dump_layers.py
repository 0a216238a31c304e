# SPDX-License-Identifier: Apache-2.0
"""Layers of a process image: pieces of the dump's files, in frames that can be unpacked in parallel.

A layer is a sequence of pairs of Zstandard frames (RFC 8878): a skippable frame that says where a piece
belongs, and a frame that holds the piece, at most 4 MiB of it:

    u32  0x184D2A5E      magic of this skippable frame, little-endian like all that follows
    u32  24              bytes of its content
    u32  file            the number of a file of the record's `dump.files`: its position, if it has no other
    u32  compressed      bytes of the frame that follows
    u64  offset          where the piece begins in the file
    u64  length          bytes of the piece

Pieces that are all zero are not stored: the record has the size of each file, and what no piece covers is a
hole. Any zstd tool can decompress a layer, which gives its pieces one after the other.
Layers of memory files consist of blocks, which can be fetched by themselves: `blocks.py`.
"""

import hashlib
import io
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO, NamedTuple, Self, cast

import zstandard
from msgspec import Struct

from oci import media_types
from oci.blocks import REST_BYTES, Block, BlockWriter, Span, first_needed, without
from oci.descriptor import Blobs, Descriptor, verified
from oci.frames import COMPRESSED_LIMIT_BYTES, HEADER, PIECE_BYTES, Header, decompress
from oci.layout import Layout
from rekindle import dump_tree as tree_of
from rekindle.config import Limits
from rekindle.digest import Digest
from rekindle.errors import FormatError, IntegrityError
from rekindle.files import data_extents, nonzero_runs, punch_hole, write_at
from rekindle.record import FileKind, StoredBlocks, StoredFile, numbered
from rekindle.verified_stream import VerifiedStream

_LAYER_BYTES = 256 << 20  # of raw content: how much an interrupted upload has to send again
_LAYERS_LIMIT = 100  # registries take about 127
_SMALL_BYTES = 8 << 30  # of memory; where there is more, larger blocks keep the record small
_DEFAULTS = Limits()
_LEVEL = 1  # 0.5 to 1 GB/s per core; level 3 takes twice as long and saves a tenth


Ranges = dict[int, list[tuple[int, int]]]
"""Ranges [start, end) of files, by their number."""


class Piece(Struct, frozen=True, kw_only=True):
    """A range of a file, which has a number, at most PIECE_BYTES long."""

    file: int
    offset: int
    length: int


def workers() -> int:
    """Return how many threads to pack or unpack with. More than eight gain little and cost 20 MiB each."""
    return min(8, len(os.sched_getaffinity(0)))


class PackedLayer(NamedTuple):
    """A layer that was written, and the blocks that a layer of memory files consists of."""

    descriptor: Descriptor
    blocks: StoredBlocks | None


def pack(tree: Path, files: Sequence[StoredFile], layout: Layout, *, workers: int) -> list[Descriptor]:
    """Write the content of the tree's files into layers of a layout; return their descriptors.

    Takes about 10 MiB of memory for each worker, whatever the size of the tree.
    """
    return [each.descriptor for each in pack_layers(tree, files, layout, workers=workers)]


def pack_layers(
    tree: Path,
    files: Sequence[StoredFile],
    layout: Layout,
    *,
    workers: int,
    order: Iterable[Span] = (),
    total_bytes: int = 0,
) -> list[PackedLayer]:
    """Write the content of the tree's files into layers of a layout, first what a restore needs first.

    `order` are parts of memory files in the order in which they were touched; each frame of memory is read
    again and compared. `total_bytes` is the size of the whole dump, if that is more than the files.
    """
    groups: dict[str, list[_Block]] = {"metadata": [], "pages": [], "shm": []}
    memory: list[Span] = []
    by_number = numbered(files)
    for number, file in by_number.items():
        if file.kind is not FileKind.FILE:
            continue
        top, extents = file.path.parts[0], _extents(tree / file.path, number)
        if top == "memory":
            memory += extents
            continue
        is_pages = top == "criu" and file.path.name.startswith("pages-")
        role = "shm" if top == "shm" else "pages" if is_pages else "metadata"
        groups[role] += [_Block((piece,)) for span in extents for piece in _pieces(span)]
    groups[media_types.MEMORY_ROLE] = list(_memory_blocks(memory, order))
    total = sum(block.size for group in groups.values() for block in group)
    layer_bytes = max(_LAYER_BYTES, -(-max(total, total_bytes) // _LAYERS_LIMIT))
    plan = [(role, layer) for role, group in groups.items() for layer in _split(group, layer_bytes)]
    with ThreadPoolExecutor(workers) as pool:
        jobs = [pool.submit(_write_layer, tree, by_number, layer, role, layout) for role, layer in plan]
        try:
            return [job.result() for job in jobs]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _extents(path: Path, number: int) -> list[Span]:
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        return [Span(number, start, start + length) for start, length in data_extents(file.fileno(), size)]


def _pieces(span: Span, most: int = PIECE_BYTES) -> Iterator[Piece]:
    for offset in range(span.start, span.end, most):
        yield Piece(file=span.file, offset=offset, length=min(most, span.end - offset))


class _Block(NamedTuple):
    """Pieces that are packed one after the other, and what they cover of memory files."""

    pieces: Sequence[Piece]
    spans: Sequence[Span] = ()

    @property
    def size(self) -> int:
        return sum(piece.length for piece in self.pieces)


def _memory_blocks(extents: Sequence[Span], order: Iterable[Span]) -> Iterator[_Block]:
    """Yield what is needed first, then the rest, file by file.

    A block of the rest covers all from its first piece to its last: what is needed first has blocks before.
    """
    first: list[Span] = []
    for spans in first_needed(order):
        first += spans
        yield _Block([piece for span in spans for piece in _pieces(span)], spans)
    rest: list[Piece] = []
    size = 0
    most = REST_BYTES if sum(each.end - each.start for each in extents) <= _SMALL_BYTES else PIECE_BYTES
    for piece in (piece for span in without(extents, first) for piece in _pieces(span, most)):
        if rest and (size + piece.length > most or rest[-1].file != piece.file):
            yield _whole(rest)
            rest, size = [], 0
        rest.append(piece)
        size += piece.length
    if rest:
        yield _whole(rest)


def _whole(pieces: Sequence[Piece]) -> _Block:
    first, last = pieces[0], pieces[-1]
    return _Block(pieces, [Span(first.file, first.offset, last.offset + last.length)])


def _split(blocks: Sequence[_Block], layer_bytes: int) -> Iterator[list[_Block]]:
    layer: list[_Block] = []
    size = 0
    for block in blocks:
        if size + block.size > layer_bytes and layer:
            yield layer
            layer, size = [], 0
        layer.append(block)
        size += block.size
    if layer:
        yield layer


def _write_layer(
    tree: Path, files: Mapping[int, StoredFile], blocks: Sequence[_Block], role: str, layout: Layout
) -> PackedLayer:
    is_memory = role == media_types.MEMORY_ROLE
    hasher, size, table = hashlib.sha256(), 0, BlockWriter()
    with _Opened(tree, files, "rb") as opened, layout.staging() as (staged, blob):
        frames = _Frames(opened, files, compares=is_memory)
        for pieces, spans in blocks:
            of_block, length = hashlib.sha256(), 0
            for part in (part for piece in pieces for part in frames.of(piece)):
                hasher.update(part)
                if is_memory:
                    of_block.update(part)
                staged.write(part)
                length += len(part)
            if length and is_memory:
                table.add(length, of_block.digest(), spans)
            size += length
        digest = Digest.of_hash(hasher)
        blob(digest)
    descriptor = Descriptor(
        media_type=media_types.DUMP_LAYER, digest=digest, size=size, annotations={media_types.ROLE: role}
    )
    return PackedLayer(descriptor, table.stored(descriptor) if is_memory else None)


class _Frames:
    """Makes the frames of pieces."""

    def __init__(self, opened: "_Opened", files: Mapping[int, StoredFile], *, compares: bool) -> None:
        """With `compares`, each frame is decompressed again, and compared with what was packed."""
        self._opened, self._files = opened, files
        self._compressor = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=False)
        self._decompressor = zstandard.ZstdDecompressor()
        self._buffer = memoryview(bytearray(PIECE_BYTES))
        self._again = memoryview(bytearray(PIECE_BYTES if compares else 0))

    def of(self, piece: Piece) -> tuple[bytes, bytes] | tuple[()]:
        """Return header and frame of a piece without the zeros around it; nothing if it is all zeros."""
        content = self._buffer[: piece.length]
        path = self._files[piece.file].path
        if os.preadv(self._opened.fileno(piece.file), [content], piece.offset) != piece.length:
            raise IntegrityError(f"{path} changed while it was packed")
        runs = list(nonzero_runs(bytes(content)))
        if not runs:
            return ()
        start, end = runs[0][0], runs[-1][1]
        frame = self._compressor.compress(content[start:end])
        if self._again and not self._gives(frame, content[start:end]):
            raise IntegrityError(f"{path} was packed wrongly", cause=f"at {piece.offset:#x}")
        return Header(piece.file, piece.offset + start, end - start, len(frame)).pack(), frame

    def _gives(self, frame: bytes, content: memoryview) -> bool:
        again = self._again[: len(content)]
        return decompress(self._decompressor, memoryview(frame), again) and again == content


class _Opened:
    """The files of a tree, by number. Only one is open at a time: pieces come file by file."""

    def __init__(self, tree: Path, files: Mapping[int, StoredFile], mode: str) -> None:
        self._tree, self._files, self._mode = tree, files, mode
        self._number: int | None = None
        self._file: BinaryIO | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def fileno(self, number: int) -> int:
        if self._file is None or self._number != number:
            self.__exit__()
            path = self._tree / self._files[number].path
            self._file = cast(BinaryIO, open(path, self._mode, buffering=0))  # noqa: SIM115
            self._number = number
        return self._file.fileno()


class Unpacked:
    """Where layers have written in a tree, by digest.

    `complete` has the layers whose digest has matched, `begun` those of which that is not known yet.
    """

    def __init__(self, complete: Mapping[str, Ranges] = MappingProxyType({})) -> None:
        self.complete = dict(complete)
        self.begun: dict[str, Ranges] = {}

    def begin(self, layer: Descriptor) -> Ranges:
        return self.begun.setdefault(str(layer.digest), {})

    def end(self, layer: Descriptor) -> None:
        self.complete[str(layer.digest)] = self.begun.pop(str(layer.digest))

    def has(self, layer: Descriptor) -> bool:
        return str(layer.digest) in self.complete

    @property
    def bytes(self) -> int:
        """The bytes that the complete layers have written."""
        layers = self.complete.values()
        return sum(end - start for each in layers for ranges in each.values() for start, end in ranges)

    def drop_begun(self, files: Sequence[StoredFile], tree: Path) -> bool:
        """Make holes of what was written without being verified.

        Returns False if some of it is where a complete layer has written: then the tree is of no use.
        """
        complete = _by_file(self.complete.values())
        for number, ranges in _by_file(self.begun.values()).items():
            for start, end in ranges:
                if any(first < end and last > start for first, last in complete.get(number, ())):
                    return False
            with open(tree / numbered(files)[number].path, "r+b", buffering=0) as file:
                for start, end in ranges:
                    punch_hole(file.fileno(), start, end - start)
        self.begun.clear()
        return True


def _by_file(layers: Iterable[Ranges]) -> dict[int, list[tuple[int, int]]]:
    found: dict[int, list[tuple[int, int]]] = {}
    for each in layers:
        for number, ranges in each.items():
            found.setdefault(number, []).extend(ranges)
    return found


def unpack(
    blobs: Blobs,
    layers: Sequence[Descriptor],
    files: Sequence[StoredFile],
    tree: Path,
    *,
    workers: int,
    limits: Limits = _DEFAULTS,
    unpacked: Unpacked | None = None,
) -> int:
    """Write the files of a dump into `tree`, an empty directory; return the bytes written.

    With `unpacked`, `tree` may be one that an earlier call has left; complete layers are not read again.

    The caller must not use the tree before this returns: only then has every digest matched. Raises
    IntegrityError if bytes do not match their digest, FormatError if a layer is malformed or expands beyond
    the limits.
    """
    unpacked = unpacked or Unpacked()
    if not unpacked.complete:
        tree_of.make(files, tree)
    stop = threading.Event()
    with ThreadPoolExecutor(workers) as pool:
        jobs = [
            pool.submit(_read_layer, blobs, layer, files, tree, stop, limits, unpacked)
            for layer in layers
            if not unpacked.has(layer)
        ]
        try:
            written = sum(job.result() for job in jobs)
        except BaseException:
            stop.set()
            blobs.cancel()
            raise
    tree_of.finish(files, tree)
    return written


def _read_layer(
    blobs: Blobs,
    layer: Descriptor,
    files: Sequence[StoredFile],
    tree: Path,
    stop: threading.Event,
    limits: Limits,
    unpacked: Unpacked,
) -> int:
    with blobs.open_blob(layer) as stream:
        written = read_pieces(stream, layer, files, tree, stop, limits, unpacked.begin(layer))
    if not stop.is_set():
        unpacked.end(layer)
    return written


def read_pieces(
    stream: io.RawIOBase,
    layer: Descriptor,
    files: Sequence[StoredFile],
    tree: Path,
    stop: threading.Event,
    limits: Limits = _DEFAULTS,
    ranges: Ranges | None = None,
) -> int:
    """Read a layer to its end and write its pieces; return the bytes written.

    `ranges` gets the ranges of each file that are written, before they are.
    """
    ranges = {} if ranges is None else ranges
    checked = verified(stream, layer, kind="layer")
    source = _Source(checked, layer)
    decompressor = zstandard.ZstdDecompressor()
    content = memoryview(bytearray(PIECE_BYTES))
    by_number = numbered(files)
    written, most = 0, limits.expanded_bytes(layer.size)
    with _Opened(tree, by_number, "r+b") as opened:
        while checked.left and not stop.is_set():
            header = Header.read(source.read(HEADER.size))
            if header is None or not _fits(header, by_number):
                raise source.verdict()
            number, offset, length, compressed = header
            if written + length > most:
                raise FormatError(
                    f"layer {layer.digest} expands to more than {most} bytes",
                    cause=f"its compressed size is {layer.size} bytes",
                    hint="the configuration sets the limit: `expansion_ratio` in [limits]",
                )
            piece = content[:length]
            if not decompress(decompressor, source.read(compressed), piece):
                raise source.verdict()
            _add_range(ranges.setdefault(number, []), offset, offset + length)
            written += write_at(opened.fileno(number), piece, offset)
    if not stop.is_set():
        checked.finish()
    return written


def _fits(header: Header, files: Mapping[int, StoredFile]) -> bool:
    file = files.get(header.file)
    return file is not None and file.kind is FileKind.FILE and header.offset + header.length <= file.size


def unpack_block(
    content: memoryview,
    block: Block,
    files: Mapping[int, StoredFile],
    fds: Mapping[int, int],
    decompressor: zstandard.ZstdDecompressor,
    room: memoryview,
) -> list[tuple[int, int, int]]:
    """Write the pieces of a block whose digest has matched; return them as (file, offset, length).

    `fds` are the files by their numbers, `room` has PIECE_BYTES. Raises FormatError if it is malformed, and
    OSError.
    """
    written, at = [], 0
    while at < len(content):
        header = Header.read(content, at) if at + HEADER.size <= len(content) else None
        at += HEADER.size
        if header is None or not _fits(header, files) or header.file not in fds:
            raise FormatError(f"a block of layer {block.layer.digest} is malformed")
        piece = room[: header.length]
        if not decompress(decompressor, content[at : at + header.compressed], piece):
            raise FormatError(f"a block of layer {block.layer.digest} is malformed")
        at += header.compressed
        write_at(fds[header.file], piece, header.offset)
        written.append((header.file, header.offset, header.length))
    return written


def _add_range(ranges: list[tuple[int, int]], start: int, end: int) -> None:
    """Add a range. Pieces of a layer follow each other, so that it usually extends the last one."""
    if ranges and ranges[-1][1] == start:
        start = ranges.pop()[0]
    ranges.append((start, end))


class _Source:
    """The bytes of a layer, in pieces of the length that is asked for."""

    def __init__(self, stream: VerifiedStream, layer: Descriptor) -> None:
        self._stream = stream
        self._layer = layer
        self._buffer = memoryview(bytearray(COMPRESSED_LIMIT_BYTES))

    def read(self, length: int) -> memoryview:
        """Return the next bytes, valid until the next call."""
        if length > self._stream.left:
            raise self.verdict()
        into = self._buffer[:length]
        self._stream.fill(into)
        return into

    def verdict(self) -> FormatError:
        """Return the error for a malformed layer.

        Raises IntegrityError instead if its bytes do not match its digest, which is the usual reason and can
        be told only after reading all of them.
        """
        self._stream.finish()
        return FormatError(f"layer {self._layer.digest} is malformed")
