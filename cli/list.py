# SPDX-License-Identifier: Apache-2.0
"""`rekindle list`: list what $REKINDLE_HOME keeps: images, unpacked dumps, and kernel caches."""

import argparse
import time
from collections.abc import Sequence

from cli import _arguments, _report, _table
from rekindle import documents
from rekindle.home import Home
from restore import housekeeping
from restore.housekeeping import Kept, KeptKind

_SCHEMA = "rekindle.list/1"
_HEAD = ("KIND", "NAME", "DIGEST", "SIZE", "USED", "STATE")
_DIGEST_LENGTH = 19  # the algorithm and 12 digits, as other tools shorten them


def main(words: Sequence[str]) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="rekindle list",
        formatter_class=_arguments.Formatter,
        description="List the images of the local store, the dumps that are unpacked for restores, and the "
        "kernel caches in $REKINDLE_HOME/caches. The tags of a repository: rekindle tags.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("-q", "--quiet", action="store_true", help="print only the names of the images")
    args = parser.parse_args(words)
    found = housekeeping.kept(Home.from_environment())
    if args.json:
        _report.print_document({"schema": _SCHEMA, "kept": [documents.to_json(each) for each in found]})
    elif args.quiet:
        for each in found:
            if each.kind is KeptKind.IMAGE:
                print(each.name)
    else:
        _table.print_table([_HEAD, *map(row, found)])
    return 0


def row(each: Kept) -> tuple[str, ...]:
    """Return the cells of a thing that is kept."""
    return (
        str(each.kind),
        each.name if each.kind is KeptKind.IMAGE else "-",
        each.digest[:_DIGEST_LENGTH],
        _table.megabytes(each.bytes),
        f"{_table.age(time.time() - each.used)} ago",
        "in use" if each.in_use else "-",
    )
