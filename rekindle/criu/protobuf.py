# SPDX-License-Identifier: Apache-2.0
"""Decode and encode the part of protobuf's wire format that CRIU's image files use, without loss."""

from collections.abc import Sequence
from pathlib import Path

from rekindle.errors import FormatError

Value = int | bytes

Field = tuple[int, int, Value]
"""A field of a protobuf message: its number, its wire type and its value."""


def integer(fields: Sequence[Field], number: int, path: Path, default: int | None = None) -> int:
    """Return the value of a varint field, the last of that number, as protobuf specifies.

    Raises FormatError if it is not a number, or is missing without a default.
    """
    value = next((value for each, _, value in reversed(fields) if each == number), default)
    if not isinstance(value, int):
        raise FormatError(f"{path.name}: field {number} is missing or not a number")
    return value


def content(fields: Sequence[Field], number: int) -> bytes | None:
    """Return the bytes of a field, which are a string or a message; None if there is none."""
    value = next((value for each, _, value in reversed(fields) if each == number), None)
    return value if isinstance(value, bytes) else None


def read_fields(message: bytes, path: Path) -> list[Field]:
    """Return the fields of a protobuf message in order (wire types 0, 1, 2 and 5). Raises FormatError."""
    found: list[Field] = []
    position = 0
    try:
        while position < len(message):
            key, position = _varint(message, position)
            value: Value
            match key & 7:
                case 0:
                    value, position = _varint(message, position)
                case 1 | 5 as wire_type:
                    width = 8 if wire_type == 1 else 4
                    value = int.from_bytes(_slice(message, position, width), "little")
                    position += width
                case 2:
                    length, position = _varint(message, position)
                    value = _slice(message, position, length)
                    position += length
                case _:
                    raise ValueError(f"wire type {key & 7}")
            found.append((key >> 3, key & 7, value))
    except (ValueError, IndexError) as error:
        raise FormatError(f"{path.name} is malformed", cause=str(error)) from None
    return found


def _slice(message: bytes, position: int, length: int) -> bytes:
    piece = message[position : position + length]
    if len(piece) < length:
        raise ValueError("a field extends beyond the message's end")
    return piece


def _varint(message: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFF_FFFF_FFFF_FFFF, position
        shift += 7
        if shift > 63:
            raise ValueError("a varint is longer than ten bytes")


def encode_fields(fields: Sequence[Field]) -> bytes:
    """Encode fields as a protobuf message, in their order."""
    out = bytearray()
    for number, wire_type, value in fields:
        _put_varint(out, number << 3 | wire_type)
        if isinstance(value, bytes):
            _put_varint(out, len(value))
            out += value
        elif wire_type == 0:
            _put_varint(out, value)
        else:
            out += value.to_bytes(8 if wire_type == 1 else 4, "little")
    return bytes(out)


def _put_varint(out: bytearray, value: int) -> None:
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
