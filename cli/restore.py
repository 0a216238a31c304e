# SPDX-License-Identifier: Apache-2.0
"""`rekindle restore`: restore a saved server in the fastest way that this node allows, and serve."""

import argparse
import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from cli import _arguments
from rekindle.errors import UsageError
from rekindle.report import Rung


def main(words: Sequence[str], *, wakes: bool = False) -> int:
    """Run the command and return its exit status. With `wakes`, a hibernated replica gives way."""
    words, command = _arguments.split_command(words)
    args = _parser().parse_args(words)
    if args.shared_port:
        if args.require not in {None, Rung.PROCESS} or args.on_demand:
            raise UsageError("--shared-port cannot be combined with --require cache or --on-demand")
        args.require = Rung.PROCESS
    if args.on_demand and not args.plan:
        from cli import _on_demand

        return _on_demand.serve(args, command)
    detached = None
    if (args.detach or args.replicas) and not args.plan:
        from cli import _detach

        begun = _detach.begin(args, command, wakes=wakes)
        if isinstance(begun, int):
            return begun
        detached = begun
    with contextlib.ExitStack() as stack:
        if detached is not None:
            stack.enter_context(detached.registration)
        cell = None
        if args.rung is Rung.PROCESS and not args.plan and os.geteuid() == 0:
            from rekindle.cell import Cell

            cell = stack.enter_context(Cell())  # it boots while we import the rest
        # Imported late: it takes most of the start-up time, which --help does not need.
        from cli._restoring import run

        return run(args, command, cell, detached)


def _parser() -> argparse.ArgumentParser:
    parser = _arguments.Parser(
        prog="rekindle restore",
        usage="rekindle restore IMAGE [options] [-- COMMAND…]",
        description="Restore a saved server and serve until it ends. Restores its process if this node "
        "matches the recorded one, else starts its command on the saved kernel cache, else the command "
        "alone. Passes signals on to the server, and exits with its status, but with 3 instead of 0 if the "
        "server ran on a rung below --rung.",
    )
    parser.add_argument("image", metavar="IMAGE", help=_arguments.IMAGE)
    parser.add_argument(
        "--publish",
        metavar="[HOST:]PORT[:SERVERPORT]",
        action="append",
        default=[],
        help="publish the server at this address of the host, or SERVERPORT of one with several ports; "
        "may be given more than once (default: the addresses that it listens on)",
    )
    parser.add_argument(
        "--listen-early",
        action="store_true",
        help="open the port before the restore begins: clients that connect early wait, and are answered "
        "once the server is ready, but a probe that only connects cannot tell whether it is",
    )
    _arguments.add_client_address(parser)
    _add_rungs(parser)
    parser.add_argument("--plan", action="store_true", help="print what would be done, and exit")
    parser.add_argument(
        "--cache-dir",
        type=Path,
        metavar="DIR",
        help="where to extract the kernel cache (default: where the server looks for it)",
    )
    parser.add_argument(
        "--ready-file", type=Path, metavar="FILE", help="create FILE while the server is ready"
    )
    parser.add_argument("--ready-url", metavar="URL", help=_arguments.READY_URL)
    parser.add_argument(
        "--memory",
        choices=["map", "copy"],
        default="map",
        help="map the dump's memory, which replicas share (default), or copy it for this one",
    )
    parser.add_argument(
        "--lazy",
        choices=["auto", "always", "never"],
        default="auto",
        help="start before all of the image is here: if that is quicker (default), always, or never",
    )
    parser.add_argument(
        "--no-prefetch",
        action="store_true",
        help="on lower rungs, do not read ahead what the server will read at its start",
    )
    parser.add_argument(
        "--paranoid", action="store_true", help="unpack the dump again, which checks every byte of it"
    )
    _add_replicas(parser)
    _arguments.add_accept_environment(parser)
    parser.add_argument(
        "--gpu",
        action="append",
        default=[],
        metavar="UUID",
        help="GPU to restore the process onto; repeat it for each that the server was on, in that order "
        "(default: the recorded one, or the one with the most free memory)",
    )
    _arguments.add_trust(parser)
    _arguments.add_registry(parser)
    _arguments.add_report(parser)
    return parser


def _add_rungs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rung",
        type=_arguments.one_of(Rung),
        choices=list(Rung),
        default=Rung.PROCESS,
        help="first rung to try (default: process)",
    )
    parser.add_argument(
        "--require",
        type=_arguments.one_of(Rung),
        choices=[Rung.PROCESS, Rung.NEUTRAL, Rung.CACHE],
        help="lowest rung to take; fail rather than go below it",
    )
    parser.add_argument(
        "--process-deadline",
        type=_arguments.seconds,
        metavar="S",
        help="try the next rung unless the process serves within S seconds (default: from the estimate)",
    )
    parser.add_argument(
        "--cache-deadline",
        type=_arguments.seconds,
        metavar="S",
        help="try the next rung unless the kernel cache is in place within S seconds "
        "(default: from the estimate)",
    )


def _add_replicas(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("replicas")
    group.add_argument(
        "--name", metavar="NAME", help="name of this replica for `rekindle ps` (default: after the image)"
    )
    group.add_argument(
        "--detach",
        action="store_true",
        help="return once the server is ready, and print its name; it runs on in the background",
    )
    group.add_argument(
        "--replicas",
        type=_count,
        metavar="N",
        help="restore N replicas, published at N consecutive ports from --publish on, or at one with "
        "--shared-port; needs --detach. Only the first goes down the ladder",
    )
    group.add_argument(
        "--shared-port",
        action="store_true",
        help="share the published port with other replicas that do so: each connection goes to the one with "
        "the fewest, and to another if that stops or is killed; only the process rung is taken",
    )
    group.add_argument(
        "--on-demand",
        action="store_true",
        help="open the port at once, restore the server when the first client connects, and let it hibernate "
        "when it is idle; only the process rung is taken",
    )
    group.add_argument(
        "--idle",
        type=_arguments.seconds,
        default=300.0,
        metavar="S",
        help="with --on-demand: hibernate after S seconds without a request (default: 300)",
    )
    parser.add_argument("--listen-fds", type=_fds, default=(), help=argparse.SUPPRESS)
    parser.add_argument("--wakes", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--await-client", type=int, metavar="PARENT", help=argparse.SUPPRESS)


def _fds(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 1000:
        raise argparse.ArgumentTypeError(f"invalid number of replicas '{text}'")
    return int(text)
