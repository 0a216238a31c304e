# SPDX-License-Identifier: Apache-2.0
"""`rekindle stop`: end servers, gracefully or not."""

import argparse
from collections.abc import Sequence

from cli import _arguments
from rekindle.home import Home
from rekindle.stop import stop


def main(words: Sequence[str]) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="rekindle stop",
        formatter_class=_arguments.Formatter,
        description="Ask servers to end, as SIGTERM does: most finish their requests first. Kill those that "
        "have not ended in time.",
    )
    parser.add_argument("names", metavar="NAME", nargs="+", help=_arguments.REPLICA)
    parser.add_argument(
        "--timeout",
        type=_arguments.seconds,
        default=30.0,
        metavar="S",
        help="kill a server that has not ended after S seconds (default: 30)",
    )
    args = parser.parse_args(words)
    stop(Home.from_environment(), args.names, args.timeout)
    return 0
