# SPDX-License-Identifier: Apache-2.0
"""`rekindle hibernate`: save a restored server, and let go of its memory and its processors."""

import argparse
from collections.abc import Sequence

from cli import _arguments, _report
from rekindle.report import Outcome
from snapshot.lent import hibernate


def main(words: Sequence[str]) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="rekindle hibernate",
        formatter_class=_arguments.Formatter,
        description="Save a restored server with what it has in memory as hibernated/NAME, signed by this "
        "machine's key, and end it. `rekindle wake NAME` brings it back.",
    )
    parser.add_argument("name", metavar="NAME", help=_arguments.REPLICA)
    parser.add_argument(
        "--drain",
        type=_arguments.seconds,
        default=10.0,
        metavar="S",
        help="wait for requests in flight, for at most S seconds (default: 10)",
    )
    parser.add_argument(
        "--allow-secret",
        action="append",
        default=[],
        metavar="NAME",
        help="allow this variable, option or kind of token in the image",
    )
    _arguments.add_report(parser)
    args = parser.parse_args(words)
    report = _report.begin("hibernate", args)
    with _report.reporting(report, args):
        _arguments.require_root()
        hibernate(args.name, report, secrets=args.allow_secret, drain_seconds=args.drain)
    _report.finish(report, args, Outcome.SAVED, f"hibernated {args.name}: rekindle wake {args.name}")
    return 0
