# SPDX-License-Identifier: Apache-2.0
"""`rekindle exec`: run a command in the cell of a server."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from cli import _arguments
from rekindle import replicas
from rekindle.errors import CapabilityError, NotFoundError, UsageError
from rekindle.home import Home


def main(words: Sequence[str]) -> int:
    """Run the command and return its exit status."""
    words, command = _arguments.split_command(words)
    parser = argparse.ArgumentParser(
        prog="rekindle exec",
        formatter_class=_arguments.Formatter,
        usage="rekindle exec NAME -- COMMAND…",
        description="Run a command in the cell of a server: it sees the server's processes, its network and "
        "its /dev/shm. Exits with the command's status.",
    )
    parser.add_argument("name", metavar="NAME", help=_arguments.REPLICA)
    args = parser.parse_args(words)
    if not command:
        raise UsageError("no command", hint=f"rekindle exec {args.name} -- ps aux")
    _arguments.require_root()
    replica = replicas.running(Home.from_environment(), args.name)
    if replica.status.cell is None:
        raise CapabilityError(
            f"the replica '{args.name}' has no cell",
            cause=f"it is {replica.state}, on the {replica.status.rung or 'first'} rung",
            hint="servers on lower rungs run among the processes of the host",
        )
    init = replica.status.cell.open()
    if init is None:
        raise NotFoundError(f"the cell of the replica '{args.name}' has ended")
    from rekindle.cell.enter import run_in

    return run_in(init, command, Path.cwd())
