# SPDX-License-Identifier: Apache-2.0
"""What processes inherited is taken out of a dump; everything else stays, byte for byte."""

from pathlib import Path

import pytest

from rekindle.criu import inherited
from rekindle.criu.image_files import read_messages, write_messages
from rekindle.criu.inherited import CORE_MAGIC, FS_MAGIC
from rekindle.criu.protobuf import Field, encode_fields, read_fields
from rekindle.errors import FormatError

TASK: list[Field] = [(1, 0, 1), (6, 2, b"python"), (8, 2, b"limits"), (13, 0, 7), (14, 0, 1000), (18, 0, 1)]
THREAD: list[Field] = [(1, 0, 5), (2, 0, 24), (3, 0, 14), (4, 0, 3), (5, 0, 2), (13, 2, b"name")]


def write_core(path: Path, *parts: tuple[int, list[Field]]) -> None:
    fields: list[Field] = [(1, 0, 1), (2, 2, b"registers")]
    fields += [(number, 2, encode_fields(each)) for number, each in parts]
    write_messages(path, CORE_MAGIC, [encode_fields(fields)])


def parts(path: Path) -> dict[int, list[Field]]:
    (message,) = read_messages(path, CORE_MAGIC)
    found = {number: value for number, _, value in read_fields(message, path)}
    assert (found.pop(1), found.pop(2)) == (1, b"registers")
    return {number: read_fields(value, path) for number, value in found.items() if isinstance(value, bytes)}


def write_fs(path: Path, umask: int) -> None:
    write_messages(path, FS_MAGIC, [encode_fields([(1, 0, 9), (2, 0, 8), (3, 0, umask)])])


def has_umask(path: Path) -> bool:
    (message,) = read_messages(path, FS_MAGIC)
    return any(number == 3 for number, _, _ in read_fields(message, path))


def test_limits_and_priorities_are_dropped(tmp_path: Path) -> None:
    write_core(tmp_path / "core-1001.img", (3, TASK), (5, THREAD))
    write_core(tmp_path / "core-1003.img", (5, THREAD))  # a thread
    write_fs(tmp_path / "fs-1001.img", 0o22)
    inherited.drop(tmp_path, 1001)
    thread = [(1, 0, 5), (2, 0, 24), (13, 2, b"name")]
    task = [(1, 0, 1), (6, 2, b"python"), (13, 0, 7), (18, 0, 1), (8, 2, b"")]
    assert parts(tmp_path / "core-1001.img") == {3: task, 5: thread}
    assert parts(tmp_path / "core-1003.img") == {5: thread}


def test_only_a_umask_that_was_inherited_is_dropped(tmp_path: Path) -> None:
    for pid, umask in ((1001, 0o22), (1002, 0o22), (1003, 0o77)):
        write_fs(tmp_path / f"fs-{pid}.img", umask)
    inherited.drop(tmp_path, 1001)
    assert [has_umask(tmp_path / f"fs-{pid}.img") for pid in (1001, 1002, 1003)] == [False, False, True]


def test_a_dump_without_its_root_is_malformed(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"fs-1001\.img is missing"):
        inherited.drop(tmp_path, 1001)
