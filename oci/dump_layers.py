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
"""

import hashlib
import io
import os
import struct
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO, Self, cast

import zstandard
from msgspec import Struct

from oci import media_types
from oci.descriptor import Blobs, Descriptor, verified
from oci.layout import Layout
from rekindle import dump_tree as tree_of
from rekindle.config import Limits
from rekindle.digest import Digest
from rekindle.errors import FormatError, IntegrityError
from rekindle.files import data_extents, nonzero_runs, punch_hole, write_at
from rekindle.record import FileKind, StoredFile, numbered
from rekindle.verified_stream import VerifiedStream

PIECE_BYTES = 4 << 20

_MAGIC = 0x184D2A5E
_HEADER = struct.Struct("<IIIIQQ")
_CONTENT_BYTES = _HEADER.size - 8
_COMPRESSED_LIMIT_BYTES = PIECE_BYTES + (PIECE_BYTES >> 7) + 1024  # more than zstd can add

_LAYER_BYTES = 256 << 20  # of raw content: how much an interrupted upload has to send again
_LAYERS_LIMIT = 100  # registries take about 127
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


def pack(tree: Path, files: Sequence[StoredFile], layout: Layout, *, workers: int) -> list[Descriptor]:
    """Write the content of the tree's files into layers of a layout; return their descriptors.

    Takes about 10 MiB of memory for each worker, whatever the size of the tree.
    """
    small: list[Piece] = []
    pages: list[Piece] = []
    memory: list[Piece] = []
    shm: list[Piece] = []
    by_number = numbered(files)
    for number, file in by_number.items():
        if file.kind is FileKind.FILE:
            is_pages = file.path.parts[0] == "criu" and file.path.name.startswith("pages-")
            by_top = {"shm": shm, "memory": memory}
            group = by_top.get(file.path.parts[0], pages if is_pages else small)
            group += list(_pieces(tree / file.path, number))
    total = sum(piece.length for piece in (*small, *pages, *memory, *shm))
    layer_bytes = max(_LAYER_BYTES, -(-total // _LAYERS_LIMIT))
    groups = {"metadata": small, "pages": pages, "memory": memory, "shm": shm}
    plan = [(role, layer) for role, group in groups.items() for layer in _split(group, layer_bytes)]
    with ThreadPoolExecutor(workers) as pool:
        jobs = [
            pool.submit(_write_layer, tree, by_number, layer, role, layout) for role, layer in plan if layer
        ]
        try:
            return [job.result() for job in jobs]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _pieces(path: Path, number: int) -> Iterator[Piece]:
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        for start, length in data_extents(file.fileno(), size):
            for offset in range(start, start + length, PIECE_BYTES):
                yield Piece(file=number, offset=offset, length=min(PIECE_BYTES, start + length - offset))


def _split(pieces: Sequence[Piece], layer_bytes: int) -> Iterator[list[Piece]]:
    layer: list[Piece] = []
    size = 0
    for piece in pieces:
        if size + piece.length > layer_bytes and layer:
            yield layer
            layer, size = [], 0
        layer.append(piece)
        size += piece.length
    if layer:
        yield layer


def _write_layer(
    tree: Path, files: Mapping[int, StoredFile], pieces: Sequence[Piece], role: str, layout: Layout
) -> Descriptor:
    compressor = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=False)
    buffer = memoryview(bytearray(PIECE_BYTES))
    hasher = hashlib.sha256()
    size = 0
    with _Opened(tree, files, "rb") as opened, layout.staging() as (staged, blob):
        for piece in pieces:
            content = buffer[: piece.length]
            if os.preadv(opened.fileno(piece.file), [content], piece.offset) != piece.length:
                raise IntegrityError(f"{files[piece.file].path} changed while it was packed")
            runs = list(nonzero_runs(bytes(content)))
            if not runs:
                continue
            start, end = runs[0][0], runs[-1][1]
            frame = compressor.compress(content[start:end])
            header = _HEADER.pack(
                _MAGIC, _CONTENT_BYTES, piece.file, len(frame), piece.offset + start, end - start
            )
            for part in (header, frame):
                hasher.update(part)
                staged.write(part)
                size += len(part)
        digest = Digest.of_hash(hasher)
        blob(digest)
    return Descriptor(
        media_type=media_types.DUMP_LAYER, digest=digest, size=size, annotations={"vnd.rekindle.role": role}
    )


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
            magic, content_bytes, number, compressed, offset, length = _HEADER.unpack(
                source.read(_HEADER.size)
            )
            if (
                magic != _MAGIC
                or content_bytes != _CONTENT_BYTES
                or compressed > _COMPRESSED_LIMIT_BYTES
                or not 0 < length <= PIECE_BYTES
                or number not in by_number
                or by_number[number].kind is not FileKind.FILE
                or offset + length > by_number[number].size
            ):
                raise source.verdict()
            if written + length > most:
                raise FormatError(
                    f"layer {layer.digest} expands to more than {most} bytes",
                    cause=f"its compressed size is {layer.size} bytes",
                    hint="the configuration sets the limit: `expansion_ratio` in [limits]",
                )
            piece = content[:length]
            if not _decompress(decompressor, source.read(compressed), piece):
                raise source.verdict()
            _add_range(ranges.setdefault(number, []), offset, offset + length)
            written += write_at(opened.fileno(number), piece, offset)
    if not stop.is_set():
        checked.finish()
    return written


def _add_range(ranges: list[tuple[int, int]], start: int, end: int) -> None:
    """Add a range. Pieces of a layer follow each other, so that it usually extends the last one."""
    if ranges and ranges[-1][1] == start:
        start = ranges.pop()[0]
    ranges.append((start, end))


def _decompress(decompressor: zstandard.ZstdDecompressor, frame: memoryview, content: memoryview) -> bool:
    """Decompress a frame into `content`; return whether it fills it exactly and nothing follows."""
    try:
        if zstandard.frame_content_size(frame) != len(content):
            return False
        # Across frames, to notice whatever follows this one.
        with decompressor.stream_reader(frame, read_across_frames=True) as reader:
            count = 0
            while count < len(content) and (got := reader.readinto(content[count:])):
                count += got
            return count == len(content) and not reader.read(1)
    except zstandard.ZstdError:
        return False


class _Source:
    """The bytes of a layer, in pieces of the length that is asked for."""

    def __init__(self, stream: VerifiedStream, layer: Descriptor) -> None:
        self._stream = stream
        self._layer = layer
        self._buffer = memoryview(bytearray(_COMPRESSED_LIMIT_BYTES))

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
