# SPDX-License-Identifier: Apache-2.0
"""Describe the files that a process has mapped or open, and compare them with those of this node.

A restored process continues with the code that it has mapped. CRIU maps the node's files again, so they must
be unchanged. A file is unchanged if its size and its content are the same: the build id of an ELF file, the
sha256 of another, parts of one that is too large for that. Its time tells nothing: builders of images set the
times of all files to one value.
"""

import contextlib
import errno
import os
import stat
from pathlib import Path

from msgspec import Struct

from rekindle.digest import Digest
from rekindle.documents import AbsolutePath, Count, Nanoseconds
from rekindle.node import elf, sampled

_HASHED_BYTES = 256 << 20
_KERNELS = "/sys/"


class MappedFile(Struct, frozen=True, kw_only=True):
    """The path, size in bytes, modification time and identity of a file.

    The identity is `build-id:HEX`, `sha256:HEX`, or `sampled:HEX` of a file that is too large to read at
    every restore; older records have "" for that. It is "" for files of the OS kernel, which only must exist.
    """

    path: AbsolutePath
    size: Count
    mtime_ns: Nanoseconds = 0
    identity: str = ""


def describe(path: str) -> MappedFile | None:
    """Describe the regular file at a path; return None if there is none."""
    try:
        status = Path(path).lstat()
    except OSError:
        return None
    if not stat.S_ISREG(status.st_mode):
        return None
    identity = ""
    if path.startswith(_KERNELS):
        return MappedFile(path=path, size=status.st_size)
    with contextlib.suppress(OSError):
        identity = _identity(Path(path), status.st_size)
    return MappedFile(path=path, size=status.st_size, mtime_ns=status.st_mtime_ns, identity=identity)


def difference(file: MappedFile) -> str:
    """Compare a recorded file with the one on this node; return what is here instead, or "" if equal."""
    try:
        status = Path(file.path).stat()
    except OSError as error:
        return "missing" if error.errno in {errno.ENOENT, errno.ENOTDIR} else os.strerror(error.errno or 0)
    except ValueError:  # no file can have such a name
        return "missing"
    if not stat.S_ISREG(status.st_mode):
        return "not a regular file"
    if status.st_size != file.size:
        return f"{status.st_size:,} bytes"
    if not file.identity:
        return ""
    try:
        here = _identity(Path(os.path.realpath(file.path)), status.st_size)
    except OSError as error:
        return os.strerror(error.errno or 0)
    return "" if here == file.identity else f"{status.st_size:,} bytes, {here[:25]}"


def describe_recorded(file: MappedFile) -> str:
    """Describe a recorded file in the words of `difference`."""
    return f"{file.size:,} bytes" + (f", {file.identity[:25]}" if file.identity else "")


def _identity(path: Path, size: int) -> str:
    if build_id := elf.build_id(path):
        return f"build-id:{build_id}"
    return Digest.of_file(path) if size <= _HASHED_BYTES else sampled.identity(path)
