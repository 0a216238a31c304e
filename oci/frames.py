# SPDX-License-Identifier: Apache-2.0
"""The frames of a layer of a dump: a header that says where a piece belongs, and the piece, compressed."""

import struct
from typing import NamedTuple, Self

import zstandard

PIECE_BYTES = 4 << 20
COMPRESSED_LIMIT_BYTES = PIECE_BYTES + (PIECE_BYTES >> 7) + 1024  # more than zstd can add
HEADER = struct.Struct("<IIIIQQ")
_MAGIC = 0x184D2A5E
_CONTENT_BYTES = HEADER.size - 8


class Header(NamedTuple):
    """The header of a piece: the number of its file, where it belongs, its length, and that of its frame."""

    file: int
    offset: int
    length: int
    compressed: int

    def pack(self) -> bytes:
        return HEADER.pack(_MAGIC, _CONTENT_BYTES, self.file, self.compressed, self.offset, self.length)

    @classmethod
    def read(cls, content: memoryview, at: int = 0) -> Self | None:
        """Read a header; None if it is none, or claims impossible sizes."""
        magic, content_bytes, file, compressed, offset, length = HEADER.unpack_from(content, at)
        if (
            magic != _MAGIC
            or content_bytes != _CONTENT_BYTES
            or compressed > COMPRESSED_LIMIT_BYTES
            or not 0 < length <= PIECE_BYTES
        ):
            return None
        return cls(file, offset, length, compressed)


def decompress(decompressor: zstandard.ZstdDecompressor, frame: memoryview, content: memoryview) -> bool:
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
