# SPDX-License-Identifier: Apache-2.0
"""`rekindle prune`: remove from $REKINDLE_HOME what no server uses."""

import argparse
import re
from collections.abc import Sequence

from cli import _arguments, _report, _table
from cli import list as listing
from rekindle import documents
from rekindle.errors import UsageError
from rekindle.home import Home
from restore import housekeeping
from restore.housekeeping import KeptKind

_SCHEMA = "rekindle.prune/1"
_UNITS = {"s": 1, "min": 60, "h": 3600, "d": 86400}


def main(words: Sequence[str]) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="rekindle prune",
        formatter_class=_arguments.Formatter,
        description="Remove from $REKINDLE_HOME what no server uses, and what killed commands left. Without "
        "--images, --dumps or --caches: dumps and caches, which the next restore makes again.",
    )
    for kind in KeptKind:
        parser.add_argument(
            f"--{kind}s", dest="kinds", action="append_const", const=kind, help=f"remove {kind}s"
        )
    parser.add_argument(
        "--older-than",
        type=_seconds,
        default=0.0,
        metavar="TIME",
        help="only what was not used for that long: 30min, 12h, 7d",
    )
    parser.add_argument(
        "--keep-size",
        type=float,
        metavar="GIB",
        help="only until the rest of these kinds takes no more, the least recently used first",
    )
    parser.add_argument("--dry-run", action="store_true", help="only show what would be removed")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    args = parser.parse_args(words)
    kinds = args.kinds or [KeptKind.DUMP, KeptKind.CACHE]
    if KeptKind.IMAGE in kinds and not args.older_than and args.keep_size is None:
        raise UsageError(
            "rekindle prune --images would remove every image",
            hint="limit it with --older-than or --keep-size",
        )
    removed = housekeeping.prune(
        Home.from_environment(),
        kinds,
        older_seconds=args.older_than,
        keep_bytes=None if args.keep_size is None else int(args.keep_size * (1 << 30)),
        dry_run=args.dry_run,
    )
    if args.json:
        found = [documents.to_json(each) for each in removed]
        _report.print_document({"schema": _SCHEMA, "dry_run": args.dry_run, "removed": found})
    else:
        _table.print_table([listing.row(each)[:4] for each in removed])
        what = "would be removed" if args.dry_run else "removed"
        print(f"{len(removed)} {what}, {_table.megabytes(housekeeping.total_bytes(removed))}")
    return 0


def _seconds(text: str) -> float:
    match = re.fullmatch(r"([0-9]{1,6})(s|min|h|d)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"'{text}' is not a time, such as 30min, 12h or 7d")
    return float(match[1]) * _UNITS[match[2]]
