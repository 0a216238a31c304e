# SPDX-License-Identifier: Apache-2.0
"""Layers of a process image: pieces of the dump's files, in frames that can be unpacked side by side.

A layer is a sequence of pairs of Zstandard frames (RFC 8878): a skippable frame that says where a piece
belongs, and the frame that holds the piece, at most 4 MiB of it:

    u32  0x184D2A5E      magic of this skippable frame, little-endian like all that follows
    u32  24              bytes of its content
    u32  file            index in the record's `dump.files`
    u32  compressed      bytes of the frame that follows
    u64  offset          where the piece begins in the file
    u64  length          bytes of the piece

Pieces that are all zero are not there: files have their size from the record and holes elsewhere. Any
zstd tool can decompress a layer, to its pieces one after the other.
"""

import contextlib
import hashlib
import os
import struct
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import zstandard

from oci import media_types
from oci import tree as tree_of
from oci.layout import Descriptor, Layout
from rekindle.digest import Digest
from rekindle.errors import FormatError, IntegrityError
from rekindle.files import data_extents, nonzero_runs
from rekindle.record import FileKind, StoredFile

PIECE_BYTES = 4 << 20

_MAGIC = 0x184D2A5E
_HEADER = struct.Struct("<IIIIQQ")
_CONTENT_BYTES = _HEADER.size - 8
_COMPRESSED_LIMIT_BYTES = PIECE_BYTES + (PIECE_BYTES >> 7) + 1024  # more than zstd ever adds

_LAYER_BYTES = 256 << 20  # of raw content: what is sent again when an upload breaks
_LAYERS_LIMIT = 100  # registries take about 127
_LEVEL = 1  # 0.5 to 1 GB/s a core; level 3 takes twice as long for a tenth less


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A stretch of a file, at most PIECE_BYTES long."""

    file: int
    offset: int
    length: int


def pack(tree: Path, files: Sequence[StoredFile], layout: Layout, *, workers: int) -> list[Descriptor]:
    """Writes the content of the tree's files into layers in a layout; returns their descriptors.

    Holds about 10 MiB for each worker, whatever the size of the tree.
    """
    small: list[Piece] = []
    pages: list[Piece] = []
    shm: list[Piece] = []
    for index, file in enumerate(files):
        if file.kind is FileKind.FILE:
            is_pages = file.path.parts[0] == "criu" and file.path.name.startswith("pages-")
            group = shm if file.path.parts[0] == "shm" else pages if is_pages else small
            group += list(_pieces(tree / file.path, index))
    total = sum(piece.length for piece in pages)
    layer_bytes = max(_LAYER_BYTES, -(-total // _LAYERS_LIMIT))
    plan = [("metadata", small), *(("pages", layer) for layer in _split(pages, layer_bytes)), ("shm", shm)]
    with ThreadPoolExecutor(workers) as pool:
        jobs = [pool.submit(_write_layer, tree, files, layer, role, layout) for role, layer in plan if layer]
        try:
            return [job.result() for job in jobs]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _pieces(path: Path, index: int) -> Iterator[Piece]:
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        for start, length in data_extents(file.fileno(), size):
            for offset in range(start, start + length, PIECE_BYTES):
                yield Piece(file=index, offset=offset, length=min(PIECE_BYTES, start + length - offset))


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
    tree: Path, files: Sequence[StoredFile], pieces: Sequence[Piece], role: str, layout: Layout
) -> Descriptor:
    compressor = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=False)
    buffer = memoryview(bytearray(PIECE_BYTES))
    hasher = hashlib.sha256()
    size = 0
    with contextlib.ExitStack() as stack, layout.staging() as (staged, blob):
        opened: dict[int, BinaryIO] = {}
        for piece in pieces:
            if piece.file not in opened:
                path = tree / files[piece.file].path
                opened[piece.file] = stack.enter_context(open(path, "rb", buffering=0))
            content = buffer[: piece.length]
            if os.preadv(opened[piece.file].fileno(), [content], piece.offset) != piece.length:
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
        digest = Digest("sha256:" + hasher.hexdigest())
        blob(digest)
    return Descriptor(
        media_type=media_types.DUMP_LAYER, digest=digest, size=size, annotations={"vnd.rekindle.role": role}
    )


def unpack(
    layout: Layout, layers: Sequence[Descriptor], files: Sequence[StoredFile], tree: Path, *, workers: int
) -> int:
    """Writes the files of a dump below `tree`, which exists and is empty; returns the bytes written.

    The caller must not use the tree before this returns: only then is every digest known to match.
    Raises IntegrityError for bytes that are not those of the digest, FormatError for a layer that lies.
    """
    tree_of.make(files, tree)
    stop = threading.Event()
    with ThreadPoolExecutor(workers) as pool:
        jobs = [pool.submit(_read_layer, layout, layer, files, tree, stop) for layer in layers]
        try:
            written = sum(job.result() for job in jobs)
        except BaseException:
            stop.set()
            raise
    tree_of.finish(files, tree)
    return written


def _read_layer(
    layout: Layout,
    layer: Descriptor,
    files: Sequence[StoredFile],
    tree: Path,
    stop: threading.Event,
) -> int:
    with layout.open_blob(layer) as stream:
        return read_pieces(stream, layer, files, tree, stop)


def read_pieces(
    stream: BinaryIO,
    layer: Descriptor,
    files: Sequence[StoredFile],
    tree: Path,
    stop: threading.Event,
) -> int:
    """Reads a layer to its end and writes its pieces; returns the bytes written."""
    decompressor = zstandard.ZstdDecompressor()
    hasher = hashlib.sha256()
    received = bytearray(_COMPRESSED_LIMIT_BYTES)
    content = memoryview(bytearray(PIECE_BYTES))
    left = layer.size
    written = 0
    with contextlib.ExitStack() as stack:
        opened: dict[int, BinaryIO] = {}
        while left and not stop.is_set():
            header = _read(stream, memoryview(received)[: _HEADER.size], left, layer)
            hasher.update(header)
            left -= _HEADER.size
            magic, content_bytes, index, compressed, offset, length = _HEADER.unpack(header)
            if (
                magic != _MAGIC
                or content_bytes != _CONTENT_BYTES
                or compressed > _COMPRESSED_LIMIT_BYTES
                or not 0 < length <= PIECE_BYTES
                or index >= len(files)
                or files[index].kind is not FileKind.FILE
                or offset + length > files[index].size
            ):
                # Most often the bytes are simply not those of the digest; only the whole blob tells.
                raise _bad_layer(layer, layer_digest(hasher, stream, received))
            frame = _read(stream, memoryview(received)[:compressed], left, layer)
            hasher.update(frame)
            left -= compressed
            try:
                if zstandard.frame_content_size(frame) != length:
                    raise zstandard.ZstdError("the frame's size is not what its header says")
                with decompressor.stream_reader(frame) as reader:
                    count = 0
                    while count < length and (got := reader.readinto(content[count:length])):
                        count += got
                if count != length:
                    raise zstandard.ZstdError("the frame is cut off")
            except zstandard.ZstdError:
                raise _bad_layer(layer, layer_digest(hasher, stream, received)) from None
            if index not in opened:
                path = tree / files[index].path
                opened[index] = stack.enter_context(open(path, "r+b", buffering=0))
            written += os.pwrite(opened[index].fileno(), content[:length], offset)
    if stop.is_set():
        return written
    if stream.read(1):
        raise IntegrityError(f"layer {layer.digest} is longer than its descriptor says")
    if "sha256:" + hasher.hexdigest() != layer.digest:
        raise IntegrityError(f"the bytes of layer {layer.digest} are not those of its digest")
    return written


def layer_digest(hasher: "hashlib._Hash", stream: BinaryIO, buffer: bytearray) -> str:
    """The digest of a layer whose rest is only to be hashed."""
    while count := stream.readinto(buffer):  # type: ignore[attr-defined]
        hasher.update(memoryview(buffer)[:count])
    return "sha256:" + hasher.hexdigest()


def _bad_layer(layer: Descriptor, got: str) -> FormatError | IntegrityError:
    if got == layer.digest:
        return FormatError(f"layer {layer.digest} is not of the form that its type says")
    return IntegrityError(f"the bytes of layer {layer.digest} are not those of its digest")


def _read(stream: BinaryIO, into: memoryview, left: int, layer: Descriptor) -> memoryview:
    count = 0
    while count < len(into) and (got := stream.readinto(into[count:])):  # type: ignore[attr-defined]
        count += got
    if count < len(into) or len(into) > left:
        raise IntegrityError(f"layer {layer.digest} is cut off")
    return into
