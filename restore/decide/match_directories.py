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
            if each.written and _read_only(each.path):
                yield Difference("directory", each.path, "writable", "read-only")
        elif os.path.lexists(each.path):
            yield Difference("directory", each.path, needed, "not a directory")
        elif not (each.made or each.written):
            yield Difference("directory", each.path, needed, "missing")
        elif place := _read_only(posixpath.dirname(each.path)):
            yield Difference("directory", each.path, needed, f"missing, and {place} is read-only")
    known = {each.path for each in process.directories}
    for path in (*process.private, *process.made):
        if path not in known and not os.path.lexists(path) and (place := _read_only(posixpath.dirname(path))):
            yield Difference("directory", path, "made by the server", f"missing, and {place} is read-only")


def _read_only(path: str) -> str:
    """Return the nearest directory to a path if nothing can be made in it; "" if something can."""
    while not os.path.lexists(path):
        path = posixpath.dirname(path)
    return "" if os.access(path, os.W_OK) else path
