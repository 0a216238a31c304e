# SPDX-License-Identifier: Apache-2.0
"""`rekindle wait`: wait until a server ends, and exit with its status."""

import argparse
from collections.abc import Sequence

from cli import _arguments
from rekindle import replicas
from rekindle.home import Home


def main(words: Sequence[str]) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="rekindle wait",
        formatter_class=_arguments.Formatter,
        description="Wait until a server ends, and exit with its status; with 137 if rekindle was killed.",
    )
    parser.add_argument("name", metavar="NAME", help=_arguments.REPLICA)
    args = parser.parse_args(words)
    home = Home.from_environment()
    replica = replicas.find(home, args.name)
    replicas.wait(replica)
    return replicas.look_again(replica).exit_status
