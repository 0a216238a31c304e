# SPDX-License-Identifier: Apache-2.0
"""`rekindle restore`: bring a saved server back by the best way that this node allows, and serve."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from cli import _arguments
from rekindle.report import Rung


def main(words: Sequence[str]) -> int:
    words, command = _arguments.split_command(words)
    parser = argparse.ArgumentParser(
        prog="rekindle restore",
        usage="rekindle restore IMAGE [options] [-- COMMAND…]",
        description="Bring a saved server back, and serve until it ends: the process itself where this node "
        "is like the recorded one, else its command on the saved kernel cache, else its command alone. "
        "Signals reach the server; its exit status is ours, but 3 instead of 0 on a rung below --rung.",
    )
    parser.add_argument("image", metavar="IMAGE", help=_arguments.IMAGE)
    parser.add_argument(
        "--publish",
        metavar="[HOST:]PORT",
        help="the host's address that leads to the server (default: where it listens, or listened)",
    )
    parser.add_argument(
        "--rung",
        type=Rung,
        choices=list(Rung),
        default=Rung.PROCESS,
        help="the rung to begin with (process)",
    )
    parser.add_argument(
        "--require",
        type=Rung,
        choices=[Rung.PROCESS, Rung.CACHE],
        help="fail rather than take a lower rung than this",
    )
    parser.add_argument("--plan", action="store_true", help="say what would be done, and do nothing")
    parser.add_argument(
        "--process-deadline", type=_seconds, metavar="S", help="seconds until the process must serve"
    )
    parser.add_argument(
        "--cache-deadline", type=_seconds, metavar="S", help="seconds until the kernel cache must be in place"
    )
    parser.add_argument(
        "--cache-dir",
        type=Path,
        metavar="DIR",
        help="where to extract the kernel cache (default: where the server looks for it)",
    )
    parser.add_argument("--ready-file", type=Path, metavar="FILE", help="is there while the server is ready")
    parser.add_argument(
        "--ready-url", metavar="URL", help="of a COMMAND that is not vLLM: answers 2xx when it is ready"
    )
    parser.add_argument(
        "--paranoid", action="store_true", help="unpack the dump anew, and so check every byte of it again"
    )
    _arguments.add_trust(parser)
    _arguments.add_registry(parser)
    _arguments.add_report(parser)
    args = parser.parse_args(words)
    # The rest is most of the start's time, which --help need not take.
    from cli._restoring import run

    return run(args, command)


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < 1e6:
        raise argparse.ArgumentTypeError(f"{text} is no number of seconds")
    return seconds
