# SPDX-License-Identifier: Apache-2.0
"""A dump's output becomes regular files, whatever it was; nothing else changes."""

from pathlib import Path

import pytest

from rekindle.criu.image_files import FILES_MAGIC, read_messages, write_messages
from rekindle.criu.outputs import FDINFO_MAGIC, name_outputs
from rekindle.criu.protobuf import Field, content, encode_fields, integer, read_fields

REGULAR, PIPE, TTY = 1, 2, 11
OUT, ERR = Path("/srv/run/stdout.log"), Path("/srv/run/stderr.log")


def message(*fields: tuple[int, int | bytes]) -> bytes:
    typed: list[Field] = [(number, 2 if isinstance(value, bytes) else 0, value) for number, value in fields]
    return encode_fields(typed)


def regular(file_id: int, name: str) -> bytes:
    inner = message((1, file_id), (2, 0o1001), (3, 0), (5, b""), (6, name.encode()))
    return message((1, REGULAR), (2, file_id), (3, inner))


def pipe(file_id: int, inode: int) -> bytes:
    return message((1, PIPE), (2, file_id), (18, message((1, file_id), (2, inode), (3, 0o1001), (4, b""))))


def terminal(file_id: int) -> bytes:
    return message((1, TTY), (2, file_id), (19, message((1, file_id), (2, 7), (3, 2), (4, b""))))


def make(place: Path, files: list[bytes], descriptors: dict[int, tuple[int, int]]) -> None:
    """A dump of one process, with descriptors as {number: (id, type)}."""
    write_messages(place / "files.img", FILES_MAGIC, files)
    entries = [message((1, i), (2, 0), (3, kind), (4, fd)) for fd, (i, kind) in descriptors.items()]
    write_messages(place / "fdinfo-2.img", FDINFO_MAGIC, entries)


def opened(place: Path) -> dict[int, tuple[int, str]]:
    """The type of each descriptor, and its name if it is a regular file."""
    names = {}
    for each in read_messages(place / "files.img", FILES_MAGIC):
        fields = read_fields(each, place)
        inner = content(fields, 3)
        name = content(read_fields(inner, place), 6) if inner is not None else b""
        file_id = integer(fields, 2, place)
        assert file_id not in names
        names[file_id] = (name or b"").decode()
    found = {}
    for each in read_messages(place / "fdinfo-2.img", FDINFO_MAGIC):
        fields = read_fields(each, place)
        found[integer(fields, 4, place)] = (integer(fields, 3, place), names[integer(fields, 1, place)])
    return found


@pytest.mark.parametrize(
    ("file", "kind", "known"),
    [
        (regular(5, "file[1b:7]"), REGULAR, "file[1b:7]"),
        (regular(5, "/dev/null"), REGULAR, "/dev/null"),
        (pipe(5, 77), PIPE, "pipe:[77]"),
        (terminal(5), TTY, "tty[8800:3]"),
    ],
)
def test_one_file_for_both_becomes_two(tmp_path: Path, file: bytes, kind: int, known: str) -> None:
    others = [regular(1, "/etc/hosts"), pipe(2, 78), regular(3, "/dev/null"), terminal(4)]
    descriptors = {0: (3, REGULAR), 1: (5, kind), 2: (5, kind)}
    kept = {6: (1, REGULAR), 7: (2, PIPE), 8: (4, TTY)}
    make(tmp_path, [*others, file], descriptors | kept)
    before = opened(tmp_path)
    name_outputs(tmp_path, {known}, OUT, ERR)
    after = opened(tmp_path)
    assert (after[1], after[2]) == ((REGULAR, str(OUT)), (REGULAR, str(ERR)))
    assert {fd: after[fd] for fd in (0, *kept)} == {fd: before[fd] for fd in (0, *kept)}


def test_output_that_is_open_elsewhere_is_stdout(tmp_path: Path) -> None:
    make(tmp_path, [pipe(5, 77), pipe(6, 77)], {1: (5, PIPE), 9: (6, PIPE)})
    name_outputs(tmp_path, {"pipe:[77]"}, OUT, ERR)
    assert opened(tmp_path) == {1: (REGULAR, str(OUT)), 9: (REGULAR, str(OUT))}
