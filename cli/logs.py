# SPDX-License-Identifier: Apache-2.0
"""`rekindle logs`: print what a detached server has written."""

import argparse
import os
import sys
import time
from collections.abc import Sequence

from cli import _arguments
from rekindle import replicas
from rekindle.errors import NotFoundError
from rekindle.home import Home

_READ_BYTES = 1 << 16
_POLL_SECONDS = 0.1


def main(words: Sequence[str]) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="rekindle logs",
        formatter_class=_arguments.Formatter,
        description="Print what a detached server has written to its standard output and error.",
    )
    parser.add_argument("name", metavar="NAME", help=_arguments.REPLICA)
    parser.add_argument("-f", "--follow", action="store_true", help="print what follows, until it ends")
    args = parser.parse_args(words)
    home = Home.from_environment()
    replica = replicas.find(home, args.name)
    try:
        log = replica.log.open("rb", buffering=0)
    except FileNotFoundError:
        raise NotFoundError(
            f"the replica '{args.name}' has no log",
            cause="it was not started with --detach, so its output went to where rekindle's did",
        ) from None
    with log:
        while True:
            runs = args.follow and replicas.look_again(replica).runs  # asked before the read of what it wrote
            _copy(log.fileno())
            if not runs:
                return 0
            time.sleep(_POLL_SECONDS)


def _copy(fd: int) -> None:
    """Print the rest of a file, as it is."""
    if os.lseek(fd, 0, os.SEEK_CUR) > os.fstat(fd).st_size:
        os.lseek(fd, 0, os.SEEK_SET)  # it was truncated
    while piece := os.read(fd, _READ_BYTES):
        sys.stdout.buffer.write(piece)
    sys.stdout.buffer.flush()
