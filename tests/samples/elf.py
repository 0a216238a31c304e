# SPDX-License-Identifier: Apache-2.0
"""ELF files of nothing but headers and notes."""

import struct
from collections.abc import Sequence


def note(order: str, name: bytes, kind: int, content: bytes, *, pad: int = 4) -> bytes:
    out = struct.pack(f"{order}3I", len(name), len(content), kind) + name
    out += bytes(-len(out) % pad) + content
    return out + bytes(-len(out) % pad)


def elf_file(
    order: str = "<",
    *,
    wide: bool = True,
    segments: Sequence[tuple[int, int, int, int]] = (),
    sections: Sequence[tuple[int, int, int, int]] = (),
    content: bytes = b"",
    content_at: int = 0x800,
    headers_at: int | None = None,
    segment_bytes: int | None = None,
    segment_count: int | None = None,
    section_count: int | None = None,
) -> bytes:
    """A file of these (type, offset, size, alignment); nothing but notes in it."""
    word = "Q" if wide else "I"
    header_bytes = 64 if wide else 52
    first = headers_at if headers_at is not None else header_bytes
    table = bytearray()
    for kind, offset, size, align in segments:
        values = (
            (kind, 4, offset, 0, 0, size, size, align) if wide else (kind, offset, 0, 0, size, size, 4, align)
        )
        table += struct.pack(f"{order}II6Q" if wide else f"{order}8I", *values)
    second = first + len(table)
    for kind, offset, size, align in sections:
        table += struct.pack(f"{order}II4{word}II2{word}", 1, kind, 0, 0, offset, size, 0, 0, align, 0)
    ident = b"\x7fELF" + bytes([2 if wide else 1, 1 if order == "<" else 2, 1]) + bytes(9)
    header = ident + struct.pack(
        f"{order}HHI3{word}I6H",
        *(3, 62, 1, 0, first if segments else 0, second if sections else 0, 0, header_bytes),
        *(segment_bytes or (56 if wide else 32), segment_count or len(segments)),
        *(64 if wide else 40, section_count or len(sections), 0),
    )
    out = bytearray(max(header_bytes, first + len(table), content_at + len(content)))
    out[:header_bytes] = header
    out[first : first + len(table)] = table
    out[content_at : content_at + len(content)] = content
    return bytes(out)
