# SPDX-License-Identifier: Apache-2.0
"""Give a dumped server's output the names of files, so that any descriptor can replace it at a restore.

    files.img      file_entry: type = 1, id = 2, then a message of that type: reg = 3, pipe = 18, tty = 19
    fdinfo-N.img   fdinfo_entry: id = 1, flags = 2, type = 3, fd = 4

A restored server writes to a file, pipe or terminal outside its cell. CRIU dumps that as what it is, and
requires one of the same kind and mode in its place (CRIU 4.2.1: `File fd/1 has bad mode`). But
`--inherit-fd` replaces a regular file by anything, and asks for its name only. So the entries are replaced by
entries of regular files.
"""

import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from rekindle.criu.image_files import FILES_MAGIC, read_messages, write_messages
from rekindle.criu.protobuf import Field, content, encode_fields, integer, read_fields

FDINFO_MAGIC = 0x56213732

_TYPE, _ID, _REG, _PIPE, _TTY = 1, 2, 3, 18, 19  # of file_entry
_REG_FLAGS, _REG_NAME = 2, 6  # of reg_file_entry
_PIPE_ID, _FLAGS = 2, 3  # of pipe_entry; tty_file_entry has its flags there, too
_FD_ID, _FD_TYPE, _FD = 1, 3, 4  # of fdinfo_entry
_REGULAR = 1  # fd_types
_VARINT, _BYTES = 0, 2  # wire types
_STDERR = 2


def name_outputs(dump: Path, found: Collection[str], stdout: Path, stderr: Path) -> None:
    """Turn what is known as one of `found` into regular files, in place: `stderr` for descriptor 2.

    `found` are CRIU's names: `file[…]`, `pipe:[…]`, `tty[…]`, or a path. A path or a terminal counts only if
    it is open as descriptor 1 or 2.
    """
    infos = {path: list(_read(path, FDINFO_MAGIC)) for path in dump.glob("fdinfo-*.img")}
    numbers: dict[int, set[int]] = {}
    for path, entries in infos.items():
        for fields in entries:
            numbers.setdefault(integer(fields, _FD_ID, path), set()).add(integer(fields, _FD, path))
    path = dump / "files.img"
    files = list(_read(path, FILES_MAGIC))
    next_id = 1 + max((integer(fields, _ID, path) for fields in files), default=0)
    written: list[list[Field]] = []
    errors: dict[int, int] = {}  # the id of the file that descriptor 2 gets instead
    for fields in files:
        file_id = integer(fields, _ID, path)
        if not _is_output(fields, path, found, numbers.get(file_id, set())):
            written.append(fields)
            continue
        flags = _flags(fields, path)
        errors[file_id] = next_id
        written += [_regular(file_id, flags, stdout), _regular(next_id, flags, stderr)]
        next_id += 1
    write_messages(path, FILES_MAGIC, [encode_fields(fields) for fields in written])
    for path, entries in infos.items():
        changed = [_redirected(fields, errors, path) for fields in entries]
        if changed != entries:
            write_messages(path, FDINFO_MAGIC, [encode_fields(fields) for fields in changed])


def _read(path: Path, magic: int) -> Iterator[list[Field]]:
    return (read_fields(message, path) for message in read_messages(path, magic))


def _is_output(fields: list[Field], path: Path, found: Collection[str], numbers: Collection[int]) -> bool:
    standard = 1 in numbers or _STDERR in numbers
    if (regular := content(fields, _REG)) is not None:
        name = (content(read_fields(regular, path), _REG_NAME) or b"").decode(errors="surrogateescape")
        return name in found and (standard or not name.startswith("/"))
    if (pipe := content(fields, _PIPE)) is not None:
        return f"pipe:[{integer(read_fields(pipe, path), _PIPE_ID, path)}]" in found
    return standard and content(fields, _TTY) is not None and any(name.startswith("tty[") for name in found)


def _flags(fields: list[Field], path: Path) -> int:
    if (regular := content(fields, _REG)) is not None:
        return integer(read_fields(regular, path), _REG_FLAGS, path)
    other = content(fields, _PIPE) or content(fields, _TTY) or b""
    return integer(read_fields(other, path), _FLAGS, path)


def _regular(file_id: int, flags: int, name: Path) -> list[Field]:
    """Return a file_entry with a reg_file_entry (CRIU's images/regfile.proto)."""
    owner = encode_fields([(number, _VARINT, 0) for number in (1, 2, 3, 4, 5)])
    regular: list[Field] = [
        (1, _VARINT, file_id),
        (_REG_FLAGS, _VARINT, flags),
        (3, _VARINT, 0),
        (5, _BYTES, owner),
        (_REG_NAME, _BYTES, os.fsencode(name)),
    ]
    return [(_TYPE, _VARINT, _REGULAR), (_ID, _VARINT, file_id), (_REG, _BYTES, encode_fields(regular))]


def _redirected(fields: list[Field], errors: Mapping[int, int], path: Path) -> list[Field]:
    """Return an fdinfo_entry that refers to a regular file, if it referred to the server's output."""
    file_id = integer(fields, _FD_ID, path)
    if file_id not in errors:
        return fields
    new_id = errors[file_id] if integer(fields, _FD, path) == _STDERR else file_id
    new = {_FD_ID: new_id, _FD_TYPE: _REGULAR}
    return [(number, wire_type, new.get(number, value)) for number, wire_type, value in fields]
