# SPDX-License-Identifier: Apache-2.0
"""Connections of a dump are closed: those that lead out, and no others."""

import socket
from pathlib import Path
from typing import Any

import pytest

from rekindle.criu import connections
from rekindle.criu.image_files import FILES_MAGIC, read_messages, write_messages
from rekindle.criu.protobuf import Field, encode_fields, integer, read_fields
from rekindle.errors import FormatError

TCP, UDP = socket.IPPROTO_TCP, socket.IPPROTO_UDP
LOCAL = [0x0100007F]
REMOTE = [0x0500000A]
MAPPED = [0, 0, 0xFFFF0000, 0x0100007F]
LONG = [0xB80D0120, 0, 0, 0x01000000]


def inet(ino: int, here: tuple[list[int], int], there: tuple[list[int], int], **changes: Any) -> bytes:
    """A file_entry of a socket, as CRIU writes it (images/sk-inet.proto)."""
    numbers = {"state": 1, "proto": TCP} | changes
    family = socket.AF_INET if len(here[0]) == 1 else socket.AF_INET6
    fields: list[Field] = [
        *((1, 0, ino), (2, 0, ino), (3, 0, family), (4, 0, 1), (5, 0, numbers["proto"])),
        *((6, 0, numbers["state"]), (7, 0, here[1]), (8, 0, there[1]), (9, 0, 2), (10, 0, 0)),
        *((11, 0, word) for word in here[0]),
        *((12, 0, word) for word in there[0]),
        *((13, 2, b"\x08\x00"), (14, 2, b"\x08\x01"), (18, 0, 9)),
    ]
    return encode_fields([(1, 0, 4), (2, 0, ino), (4, 2, encode_fields(fields))])


def unix(ino: int, peer: int) -> bytes:
    fields: list[Field] = [(1, 0, ino), (2, 0, ino), (3, 0, 1), (4, 0, 7), (8, 0, peer), (11, 2, b"")]
    return encode_fields([(1, 0, 5), (2, 0, ino), (16, 2, encode_fields(fields))])


def dump(directory: Path, *entries: bytes) -> Path:
    write_messages(directory / "files.img", FILES_MAGIC, entries)
    return directory


def entries(directory: Path) -> list[bytes]:
    return list(read_messages(directory / "files.img", FILES_MAGIC))


def changed(message: bytes, number: int) -> dict[int, object]:
    entry = next(value for each, _, value in read_fields(message, Path("x")) if each == number)
    assert isinstance(entry, bytes)
    return {each: value for each, _, value in read_fields(entry, Path("x"))}


@pytest.mark.parametrize(
    ("here", "there", "name"),
    [
        ((LOCAL, 4000), (REMOTE, 443), "10.0.0.5:443"),
        ((LOCAL, 4000), (LOCAL, 443), "127.0.0.1:443"),
        ((LONG, 4000), (LONG, 443), "[2001:db8::1]:443"),
        ((MAPPED, 4000), (MAPPED, 443), "127.0.0.1:443"),
    ],
)
def test_a_tcp_connection_without_its_other_end_is_closed(
    tmp_path: Path, here: tuple[list[int], int], there: tuple[list[int], int], name: str
) -> None:
    (tmp_path / "tcp-stream-4d2.img").touch()
    (tmp_path / "tcp-stream-4d3.img").touch()
    assert connections.close(dump(tmp_path, inet(1234, here, there)), [], tcp=True) == [name]
    new = changed(entries(tmp_path)[0], 4)
    assert [new[number] for number in (2, 6, 7, 8, 11, 12, 19)] == [1234, 7, 0, 0, 0, 0, 3]
    assert (new[3], new[13], new[18]) == (
        socket.AF_INET if len(here[0]) == 1 else socket.AF_INET6,
        b"\x08\x00",
        9,
    )
    assert [path.name for path in tmp_path.glob("tcp-stream*")] == ["tcp-stream-4d3.img"]


def test_what_stays_within_is_not_touched(tmp_path: Path) -> None:
    kept = [
        inet(1, (LOCAL, 4000), (MAPPED, 8000)),
        inet(2, (MAPPED, 8000), (LOCAL, 4000)),
        inet(3, (LOCAL, 53), (REMOTE, 53), proto=UDP),
        inet(4, (LOCAL, 8000), ([0], 0), state=10),
        unix(5, 6),
        unix(6, 5),
        encode_fields([(1, 0, 1), (2, 0, 7), (3, 2, b"")]),
    ]
    assert connections.close(dump(tmp_path, *kept), [], tcp=True) == []
    assert entries(tmp_path) == kept
    only = inet(1, (LOCAL, 4000), (REMOTE, 443))
    assert connections.close(dump(tmp_path, only), [], tcp=False) == []
    assert entries(tmp_path) == [only]


def test_a_unix_connection_loses_its_other_end(tmp_path: Path) -> None:
    other = unix(7, 8)
    assert connections.close(dump(tmp_path, unix(5, 6), other), [5], tcp=False) == []
    first, second = entries(tmp_path)
    new = changed(first, 16)
    assert [new[number] for number in (2, 4, 8, 12)] == [5, 1, 0, 3]
    assert integer(read_fields(first, Path("x")), 2, Path("x")) == 5
    assert second == other


def test_an_address_of_another_length_is_malformed(tmp_path: Path) -> None:
    with pytest.raises(FormatError):
        connections.close(dump(tmp_path, inet(1, ([1, 2], 4000), (REMOTE, 443))), [], tcp=True)
