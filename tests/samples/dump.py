# SPDX-License-Identifier: Apache-2.0
"""The image files of CRIU that tell what memory a process has."""

import struct
from collections.abc import Sequence
from pathlib import Path

from rekindle.criu.image_files import (
    IMAGE_MAGIC,
    MM_MAGIC,
    PAGEMAP_MAGIC,
    PE_PRESENT,
    VMA_ANON_PRIVATE,
    read_pagemap,
)

PAGE = 4096
BASE = 0x7F00_0000_0000
PE_PARENT, PE_LAZY = 1 << 0, 1 << 1
VMA_FILE_PRIVATE = 1 << 7
ZERO = bytes(PAGE)
ONE = b"\1" * PAGE


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value)


def blob(field: int, content: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(content)) + content


def image(magic: int, *messages: bytes) -> bytes:
    parts = [struct.pack("<I", len(message)) + message for message in messages]
    return struct.pack("<II", IMAGE_MAGIC, magic) + b"".join(parts)


def entry(address: int, pages: int, flags: int = PE_PRESENT) -> bytes:
    return number(1, address) + number(2, 0) + number(4, flags) + number(5, pages)


def pagemap(*entries: bytes, pages_id: int = 1) -> bytes:
    return image(PAGEMAP_MAGIC, number(1, pages_id), *entries)


def mapping(start: int, end: int, status: int = VMA_ANON_PRIVATE, flags: int = 0) -> bytes:
    """A vma_entry, with the fields that CRIU writes and we do not read."""
    return b"".join(
        number(field, value)
        for field, value in ((1, start), (2, end), (3, 0), (4, 0), (5, 3), (6, flags), (7, status))
    )


def mm(*mappings: bytes) -> bytes:
    head = b"".join(number(field, 0x400000) for field in range(1, 13))
    return image(MM_MAGIC, head + b"".join(blob(14, each) for each in mappings) + number(15, 1))


def write_dump(
    dump: Path, mappings: Sequence[bytes], entries: Sequence[bytes], pages: bytes, pid: int = 7
) -> None:
    (dump / f"mm-{pid}.img").write_bytes(mm(*mappings))
    (dump / f"pagemap-{pid}.img").write_bytes(pagemap(*entries))
    (dump / "pages-1.img").write_bytes(pages)


def memory(dump: Path, name: str = "pagemap-7.img") -> dict[int, bytes]:
    """What a restore would fill: pages by address."""
    pages_id, stretches = read_pagemap(dump / name)
    content = (dump / f"pages-{pages_id}.img").read_bytes()
    found: dict[int, bytes] = {}
    at = 0
    for stretch in stretches:
        if stretch.flags & PE_PRESENT:
            for index in range(stretch.pages):
                found[stretch.address + index * PAGE] = content[at : at + PAGE]
                at += PAGE
    assert at == len(content)
    return found
