# SPDX-License-Identifier: Apache-2.0
"""Layers of a process image, made by hand."""

import random
import struct

import zstandard

from oci import media_types
from oci.descriptor import Descriptor
from oci.layout import Layout

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
