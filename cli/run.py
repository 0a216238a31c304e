# SPDX-License-Identifier: Apache-2.0
"""`rekindle run`: run a server in a cell, so that it can be saved while it runs."""

import argparse
import contextlib
from collections.abc import Sequence
from pathlib import Path

from cli import _arguments, _detach, _report
from rekindle.home import Home
from rekindle.replicas import register
from snapshot.options import READY_SECONDS


def main(words: Sequence[str]) -> int:
    """Run the command and return its exit status."""
    words, command = _arguments.split_command(words)
    args = _parser().parse_args(words)
    _arguments.require_root()
    _report.refuse_unwritable(args.report)
    args.replicas, args.require, args.image = None, None, ""  # `ps` shows none
    detached = None
    if args.detach:
        begun = _detach.begin(args)
        if isinstance(begun, int):
            return begun
        detached = begun
    from cli._console import Console
    from rekindle.cell import Network
    from rekindle.environment import KEY_VARIABLES
    from restore.client_address import ClientAddress
    from snapshot.run import Follower, RunOptions, run

    with contextlib.ExitStack() as stack:
        entry = (
            detached.registration if detached else register(Home.from_environment(), args.name, args.image)
        )
        registration = stack.enter_context(entry)
        options = RunOptions(
            command=tuple(command),
            network=Network(args.network),
            publish=tuple(args.publish),
            client_address=ClientAddress(args.client_address) if args.client_address else None,
            ready_seconds=args.ready_timeout,
            ready_url=args.ready_url,
            ready_file=args.ready_file,
            oracle_file=args.oracle_request,
            reseed=args.reseed,
            private_variables=KEY_VARIABLES,
        )
        if detached is None:
            registration.log.touch(mode=0o600)
            stack.enter_context(Follower(registration.log, 2 if args.json else 1))
        status = run(options, registration, Console(args, detached))
        registration.end(status)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = _arguments.Parser(
        prog="rekindle run",
        usage="rekindle run NAME [options] -- COMMAND…",
        description="Run a server in a cell, as a restored one runs, and serve until it ends: then "
        "`rekindle snapshot IMAGE --replica NAME` can save it while it serves on. Passes signals on to the "
        "server, and exits with its status.",
    )
    parser.add_argument("name", metavar="NAME", help="name of the server for `rekindle ps`")
    parser.add_argument(
        "--publish",
        metavar="[HOST:]PORT",
        action="append",
        default=[],
        help="publish the server at this address of the host (default: the address that it listens on)",
    )
    _arguments.add_client_address(parser)
    parser.add_argument(
        "--network",
        choices=["private", "host"],
        default="private",
        help="network of the server: its own, or the host's (default: private)",
    )
    _arguments.add_ready_timeout(parser, READY_SECONDS)
    _arguments.add_reseed(parser)
    parser.add_argument("--ready-url", metavar="URL", help=_arguments.READY_URL)
    parser.add_argument("--oracle-request", type=Path, metavar="FILE", help=_arguments.ORACLE_REQUEST)
    parser.add_argument(
        "--ready-file", type=Path, metavar="FILE", help="create FILE while the server is ready"
    )
    parser.add_argument(
        "--detach", action="store_true", help="return once the server is ready; it runs on in the background"
    )
    _arguments.add_report(parser)
    return parser
