# SPDX-License-Identifier: Apache-2.0
"""`rekindle wake`: bring a hibernated server back."""

import argparse
import os
from collections.abc import Sequence

from cli import _arguments, restore
from rekindle import replicas
from rekindle.errors import NotFoundError, UsageError
from rekindle.home import Home


def main(words: Sequence[str]) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="rekindle wake",
        formatter_class=_arguments.Formatter,
        description="Bring a hibernated server back, in the background, with the options with which it was "
        "restored. Returns once it is ready.",
    )
    parser.add_argument("name", metavar="NAME", help=_arguments.REPLICA)
    _arguments.add_report(parser)
    args = parser.parse_args(words)
    entry = replicas.find(Home.from_environment(), args.name)
    if not entry.can_wake:
        raise NotFoundError(f"the replica '{args.name}' does not hibernate", cause=f"it is {entry.state}")
    status = entry.status
    if status.guarded and not os.environ.get("VLLM_API_KEY"):
        raise UsageError(
            f"the replica '{args.name}' required an API key, which is not kept", hint="set VLLM_API_KEY"
        )
    asked = [status.hibernated, *status.options, "--name", args.name, "--detach", *_passed(args)]
    return restore.main([*asked, *(["--", *status.command] if status.command else [])], wakes=True)


def _passed(args: argparse.Namespace) -> list[str]:
    found = ["--json"] if args.json else []
    found += ["--quiet"] if args.quiet else []
    return found + (["--report", str(args.report)] if args.report else [])
