# SPDX-License-Identifier: Apache-2.0
"""`rekindle tags`: list the tags of a repository, of a layout directory, or of the local store."""

import argparse
from collections.abc import Sequence

from cli import _arguments, _report
from oci import flow
from rekindle.text import printable

_SCHEMA = "rekindle.tags/1"


def main(words: Sequence[str]) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="rekindle tags",
        formatter_class=_arguments.Formatter,
        description="List the tags of a repository or a layout directory. Tags of signatures are left out.",
    )
    parser.add_argument("where", metavar="WHERE", help="HOST[:PORT]/repository, or oci:DIR")
    _arguments.add_registry(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    args = parser.parse_args(words)
    tags = flow.tags(args.where, registry=_arguments.registry(args))
    if args.json:
        _report.print_document({"schema": _SCHEMA, "where": args.where, "tags": tags})
    else:
        for tag in tags:
            print(printable(tag))
    return 0
