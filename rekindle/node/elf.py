# SPDX-License-Identifier: Apache-2.0
"""Read the GNU build id of an ELF file, which identifies the build that made it.

The header, program headers, section headers and notes are those of the System V gABI, chapters 4 and 5, as
in elf(5), except that notes are padded to 8 bytes where the segment says so and to 4 elsewhere
(`ELF_NOTE_DESC_OFFSET` of binutils). The build id is the note `NT_GNU_BUILD_ID` of "GNU", written by
`ld --build-id`. Linked files have it in a PT_NOTE segment; object files and modules of the OS kernel have
only sections.
"""

import os
import stat
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from msgspec import Struct

_PT_NOTE = 4
_SHT_NOTE = 7
_NT_GNU_BUILD_ID = 3

# In most files, the first read gets the header, the program headers and the note.
_HEAD_BYTES = 4096
# More than linkers write, and few enough that a hostile file cannot waste time.
_SEGMENTS_LIMIT = 512
_SECTIONS_LIMIT = 4096
_PIECES_LIMIT = 32
_PIECE_BYTES = 16 << 10
_NOTES_LIMIT = 256
_ID_BYTES = 64


class _Form(Struct, frozen=True, kw_only=True):
    """The layout for one class and byte order. A triple holds the fields for offset, size and alignment."""

    header_at: int
    header: struct.Struct
    segment: struct.Struct
    segment_fields: tuple[int, int, int]
    section: struct.Struct
    section_fields: tuple[int, int, int]
    note: struct.Struct


def _form(order: str, *, wide: bool) -> _Form:
    word = "Q" if wide else "I"
    return _Form(
        header_at=32 if wide else 28,  # from e_phoff to e_shnum
        header=struct.Struct(f"{order}{word}{word}I5H"),
        segment=struct.Struct(f"{order}II6Q" if wide else f"{order}8I"),
        segment_fields=(2, 5, 7) if wide else (1, 4, 7),
        section=struct.Struct(f"{order}II4{word}II2{word}"),
        section_fields=(4, 5, 8),
        note=struct.Struct(f"{order}3I"),
    )


# By EI_CLASS and EI_DATA.
_FORMS = {
    b"\x01\x01": _form("<", wide=False),
    b"\x01\x02": _form(">", wide=False),
    b"\x02\x01": _form("<", wide=True),
    b"\x02\x02": _form(">", wide=True),
}


def build_id(path: Path) -> str:
    """Return the GNU build id of an ELF file in hex; "" if it has none or is not an ELF file.

    Accepts any content, and reads at most about 1 MiB of it. Does not follow symbolic links. Raises OSError
    as open() does.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        file = os.fstat(fd)
        return _build_id(fd, file.st_size) if stat.S_ISREG(file.st_mode) else ""
    except OSError:  # from a read
        return ""
    finally:
        os.close(fd)


def _build_id(fd: int, size: int) -> str:
    head = os.pread(fd, _HEAD_BYTES, 0)
    form = _FORMS.get(head[4:6]) if head.startswith(b"\x7fELF") else None
    if form is None or len(head) < form.header_at + form.header.size:
        return ""
    fields = form.header.unpack_from(head, form.header_at)
    segments_at, sections_at, _, _, segment_bytes, segments, section_bytes, sections = fields

    def read(start: int, length: int) -> bytes:
        """Read what exists of a range. The file's own headers name it, so it may lie anywhere."""
        end = min(start + length, size)
        if end <= len(head):
            return head[start:end]
        return os.pread(fd, end - start, start) if start < end else b""

    found = ""
    if segment_bytes == form.segment.size:
        table = read(segments_at, min(segments, _SEGMENTS_LIMIT) * segment_bytes)
        headers = form.segment.iter_unpack(table[: len(table) // segment_bytes * segment_bytes])
        pieces = [[h[field] for field in form.segment_fields] for h in headers if h[0] == _PT_NOTE]
        found = _find(pieces, read, form.note)
    if not found and section_bytes == form.section.size:
        table = read(sections_at, min(sections, _SECTIONS_LIMIT) * section_bytes)
        headers = form.section.iter_unpack(table[: len(table) // section_bytes * section_bytes])
        pieces = [[h[field] for field in form.section_fields] for h in headers if h[1] == _SHT_NOTE]
        found = _find(pieces, read, form.note)
    return found


def _find(pieces: Sequence[Sequence[int]], read: Callable[[int, int], bytes], note: struct.Struct) -> str:
    """Return the first build id in note segments or sections, given as (offset, size, alignment); or ""."""
    for start, length, align in pieces[:_PIECES_LIMIT]:
        for name, kind, content in _notes(read(start, min(length, _PIECE_BYTES)), align, note):
            if kind == _NT_GNU_BUILD_ID and name == b"GNU\0" and 0 < len(content) <= _ID_BYTES:
                return content.hex()
    return ""


def _notes(piece: bytes, align: int, note: struct.Struct) -> Iterator[tuple[bytes, int, bytes]]:
    """Yield the name, type and content of each complete note."""
    pad = 8 if align == 8 else 4
    at = 0
    for _ in range(_NOTES_LIMIT):
        if at + note.size > len(piece):
            return
        name_bytes, content_bytes, kind = note.unpack_from(piece, at)
        name_at = at + note.size
        start = at + -(-(note.size + name_bytes) // pad) * pad
        end = start + content_bytes
        if end > len(piece):
            return
        yield piece[name_at : name_at + name_bytes], kind, piece[start:end]
        at = -(-end // pad) * pad
