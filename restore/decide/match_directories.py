# SPDX-License-Identifier: Apache-2.0
"""Compare the directories that a restore needs with those of this node."""

import os
import posixpath
from collections.abc import Iterator

from rekindle.record import Record
from restore.decide.difference import Difference


def compare(record: Record) -> Iterator[Difference]:
    """Yield a difference for each directory that is missing and cannot be made, or must be writable."""
    process = record.process
    for each in process.directories:
        needed = "made by the server" if each.made else "there"
        if os.path.isdir(each.path):  # noqa: PTH112
            if each.written and (problem := _read_only(each.path)):
                yield Difference("directory", each.path, "writable", problem)
        elif os.path.lexists(each.path):
            yield Difference("directory", each.path, needed, "not a directory")
        elif not (each.made or each.written):
            yield Difference("directory", each.path, needed, "missing")
        elif problem := _read_only(posixpath.dirname(each.path)):
            yield Difference("directory", each.path, needed, f"missing, and {problem}")
    known = {each.path for each in process.directories}
    for path in process.private:
        if (
            path not in known
            and not os.path.lexists(path)
            and (problem := _read_only(posixpath.dirname(path)))
        ):
            yield Difference("directory", path, "made by the server", f"missing, and {problem}")


def _read_only(path: str) -> str:
    """Return why nothing can be made at a path, whose parents may be missing; "" if it can."""
    above = path
    while not os.path.lexists(above):
        above = posixpath.dirname(above)
    if os.access(above, os.W_OK):
        return ""
    return "read-only" if above == path else f"{above} is read-only"
