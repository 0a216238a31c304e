# SPDX-License-Identifier: Apache-2.0
"""Read and write CRIU's image files.

An image file is two little-endian u32 magics, then messages: a u32 length and that many bytes of
protobuf (CRIU's `criu/include/magic.h` and `images/*.proto`; the format of CRIU 1.5 and newer). For a
task's memory, `mm-PID.img` lists the mappings and `pagemap-PID.img` the stretches of pages;
`pages-ID.img` holds those pages back to back, without a header.
"""

import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

from msgspec import Struct

from rekindle.criu.protobuf import encode_fields, integer, read_fields
from rekindle.errors import FormatError
from rekindle.files import PAGE_BYTES

IMAGE_MAGIC = 0x54564319
PAGEMAP_MAGIC = 0x56084025
MM_MAGIC = 0x57492820
FILES_MAGIC = 0x56303138

# pagemap_entry.flags: the pages are in the pages file.
PE_PRESENT = 1 << 2
# vma_entry.status: the kind of mapping.
VMA_ANON_PRIVATE = 1 << 9
VMA_AIORING = 1 << 13
VMA_GUARDS = 1 << 16
MAP_HUGETLB = 0x40000

ADDRESS_END = 1 << 64
_MESSAGE_LIMIT_BYTES = 64 << 20


class Stretch(Struct, frozen=True, kw_only=True):
    """Consecutive pages of a task: their first address, their number, and pagemap_entry's flags."""

    address: int
    pages: int
    flags: int


class Mapping(Struct, frozen=True, kw_only=True):
    """A mapping of a task, from `start` up to but excluding `end`."""

    start: int
    end: int
    flags: int
    status: int

    @property
    def reads_zero_when_absent(self) -> bool:
        """Tell whether a page that is not restored reads as zeros.

        Only plain anonymous memory does: an absent page of a private file mapping shows the file.
        """
        return bool(self.status & VMA_ANON_PRIVATE) and not (
            self.status & VMA_AIORING or self.flags & MAP_HUGETLB
        )


def append_stretch(stretches: list[Stretch], new: Stretch) -> None:
    """Append a stretch, merged into the last one where it continues it."""
    last = stretches[-1] if stretches else None
    if last and last.flags == new.flags and last.address + last.pages * PAGE_BYTES == new.address:
        stretches[-1] = Stretch(address=last.address, pages=last.pages + new.pages, flags=last.flags)
    else:
        stretches.append(new)


def read_pagemap(path: Path) -> tuple[int, list[Stretch]]:
    """Return the number of the pages file and its stretches in order. Raises FormatError."""
    messages = read_messages(path, PAGEMAP_MAGIC)
    head = read_fields(next(messages, b""), path)
    stretches = []
    previous_end = 0
    for message in messages:
        fields = read_fields(message, path)
        stretch = Stretch(
            address=integer(fields, 1, path),
            # nr_pages became 64 bits wide in CRIU 4.1; the old one is still written, as 0 or the same.
            pages=integer(fields, 5, path, default=0) or integer(fields, 2, path),
            flags=integer(fields, 4, path, default=PE_PRESENT),
        )
        in_parent = integer(fields, 3, path, default=0)
        if in_parent or stretch.address % PAGE_BYTES or not 0 < stretch.pages < 1 << 40:
            raise FormatError(f"{path.name}: unsupported entry: {stretch}")
        if stretch.address < previous_end:
            raise FormatError(f"{path.name}: the entries are out of order")
        previous_end = stretch.address + stretch.pages * PAGE_BYTES
        if previous_end > ADDRESS_END:
            raise FormatError(f"{path.name}: an entry beyond the end of the address space")
        stretches.append(stretch)
    return integer(head, 1, path), stretches


def write_pagemap(path: Path, pages_id: int, stretches: Sequence[Stretch]) -> None:
    """Overwrite a pagemap file. Not atomic."""
    messages = [encode_fields([(1, 0, pages_id)])]
    messages += [
        encode_fields([(1, 0, s.address), (2, 0, 0), (4, 0, s.flags), (5, 0, s.pages)]) for s in stretches
    ]
    write_messages(path, PAGEMAP_MAGIC, messages)


def write_messages(path: Path, magic: int, messages: Sequence[bytes]) -> None:
    """Overwrite an image file. Not atomic."""
    out = bytearray(struct.pack("<II", IMAGE_MAGIC, magic))
    for message in messages:
        out += struct.pack("<I", len(message)) + message
    path.write_bytes(out)


def read_mappings(path: Path) -> list[Mapping]:
    """Read the mappings of a task from its mm-PID.img. Raises FormatError."""
    message = next(read_messages(path, MM_MAGIC), None)
    if message is None:
        raise FormatError(f"{path.name} is empty")
    mappings: list[Mapping] = []
    for number, _, value in read_fields(message, path):
        if number == 14 and isinstance(value, bytes):
            fields = read_fields(value, path)
            start, end = integer(fields, 1, path), integer(fields, 2, path)
            if integer(fields, 7, path) & VMA_GUARDS:
                continue  # pages of a mapping that is listed by itself; CRIU 4.2 appends them in no order
            before = mappings[-1].end if mappings else 0
            if start % PAGE_BYTES or end % PAGE_BYTES or end <= start or start < before:
                raise FormatError(f"{path.name}: invalid mapping {start:#x}-{end:#x} after {before:#x}")
            mappings.append(
                Mapping(
                    start=start,
                    end=end,
                    flags=integer(fields, 6, path),
                    status=integer(fields, 7, path),
                )
            )
    return mappings


def read_messages(path: Path, magic: int) -> Iterator[bytes]:
    """Read the messages of an image file.

    Raises FormatError if the file is missing or truncated, or has another magic.
    """
    try:
        file = open(path, "rb")  # noqa: SIM115
    except FileNotFoundError:
        raise FormatError(f"{path.name} is missing") from None
    with file:
        if file.read(8) != struct.pack("<II", IMAGE_MAGIC, magic):
            raise FormatError(f"{path.name} does not begin as a CRIU image file of that name should")
        while prefix := file.read(4):
            if len(prefix) < 4:
                raise FormatError(f"{path.name} is truncated")
            (length,) = struct.unpack("<I", prefix)
            if length > _MESSAGE_LIMIT_BYTES:
                raise FormatError(f"{path.name}: a message of {length} bytes is too large")
            message = file.read(length)
            if len(message) < length:
                raise FormatError(f"{path.name} is truncated")
            yield message
