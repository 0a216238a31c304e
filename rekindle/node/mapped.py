# SPDX-License-Identifier: Apache-2.0
"""Files of the node that a process has mapped or open, and whether one here is the same.

A process in memory goes on with the code that it has mapped: CRIU maps the files of the node again, and they
must be what they were. A file is the same if its size is, and its time, or else its content: for an ELF file
its build id says so, for another its sha256.
"""

import contextlib
import errno
import os
import stat
from pathlib import Path

from msgspec import Struct

from rekindle.digest import Digest
from rekindle.documents import AbsolutePath, Count, Nanoseconds
from rekindle.node import elf

_HASHED_BYTES = 256 << 20


class MappedFile(Struct, frozen=True, kw_only=True):
    """A file by its path, size in bytes, time of change and identity.

    The identity is `build-id:HEX`, `sha256:HEX`, or empty for a file too large to be read at every restore.
    """

    path: AbsolutePath
    size: Count
    mtime_ns: Nanoseconds = 0
    identity: str = ""


def describe(path: str) -> MappedFile | None:
    """What a regular file is; None if there is none at that path."""
    try:
        status = Path(path).lstat()
    except OSError:
        return None
    if not stat.S_ISREG(status.st_mode):
        return None
    identity = ""
    with contextlib.suppress(OSError):
        identity = _identity(Path(path), status.st_size)
    return MappedFile(path=path, size=status.st_size, mtime_ns=status.st_mtime_ns, identity=identity)


def difference(file: MappedFile) -> str:
    """What is here instead of a file, in words; empty if it is the same."""
    try:
        status = Path(file.path).stat()
    except OSError as error:
        return "missing" if error.errno in {errno.ENOENT, errno.ENOTDIR} else os.strerror(error.errno or 0)
    except ValueError:  # a name that no file can have
        return "missing"
    if not stat.S_ISREG(status.st_mode):
        return "no regular file"
    if status.st_size != file.size:
        return f"{status.st_size:,} bytes"
    if not file.identity or status.st_mtime_ns == file.mtime_ns:
        return ""
    try:
        here = _identity(Path(os.path.realpath(file.path)), status.st_size)
    except OSError as error:
        return os.strerror(error.errno or 0)
    return "" if here == file.identity else f"{status.st_size:,} bytes, {here[:25]}"


def in_words(file: MappedFile) -> str:
    """The file as it was recorded, as `difference` puts it."""
    return f"{file.size:,} bytes" + (f", {file.identity[:25]}" if file.identity else "")


def _identity(path: Path, size: int) -> str:
    if build_id := elf.build_id(path):
        return f"build-id:{build_id}"
    return Digest.of_file(path) if size <= _HASHED_BYTES else ""
