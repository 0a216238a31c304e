# SPDX-License-Identifier: Apache-2.0
"""The files that a start of a server reads, in the order in which it first needs them, as a text.

Each line is a file: how many characters its path shares with the one before, a space, and the rest of the
path. If the start reads only parts of the file, or it is large, they follow after tabs, as OFFSET+LENGTH in
bytes. For vLLM that is 10,000 files in some 0.3 MB, which only a rung that starts a server has to parse.
"""

import os.path
import re
from collections.abc import Iterable
from typing import NamedTuple

from rekindle.errors import FormatError

FILES_LIMIT = 50_000
PARTS_LIMIT = 100_000
TEXT_LIMIT = 4 << 20
_NUMBER = re.compile("[0-9]{1,18}")
_PATH_LIMIT = 4095


class StartRead(NamedTuple):
    """A file, and its parts that are read, (offset, length) in bytes; all of it without any."""

    path: str
    parts: tuple[tuple[int, int], ...] = ()


def encode(reads: Iterable[StartRead]) -> str:
    """Return the text. Paths contain neither line feeds nor tabs."""
    lines, before = [], ""
    for path, parts in reads:
        shared = len(os.path.commonprefix((before, path)))  # noqa: RUF071 - characters, not components
        lines.append("\t".join((f"{shared} {path[shared:]}", *(f"{at}+{length}" for at, length in parts))))
        before = path
    return "\n".join(lines)


def decode(text: str) -> list[StartRead]:
    """Return the files of a text. Raises FormatError."""
    reads, before, count = [], "", 0
    for line in text.split("\n") if text else ():
        name, *parts = line.split("\t")
        shared, _, rest = name.partition(" ")
        path = before[: _number(shared)] + rest
        if not path.startswith("/") or len(path) > _PATH_LIMIT or "\0" in path:
            raise FormatError("the record names an invalid file that a start reads", cause=f"{path!r:.120}")
        found = tuple((_number(at), _number(size)) for at, _, size in (each.partition("+") for each in parts))
        reads.append(StartRead(path, found))
        before, count = path, count + len(found)
    if len(reads) > FILES_LIMIT or count > PARTS_LIMIT:
        raise FormatError(f"the record names {len(reads)} files that a start reads, in {count} parts")
    return reads


def _number(text: str) -> int:
    if not _NUMBER.fullmatch(text):
        raise FormatError(
            "the record names an invalid part of a file that a start reads", cause=f"{text!r:.60}"
        )
    return int(text)
