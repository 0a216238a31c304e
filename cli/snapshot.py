# SPDX-License-Identifier: Apache-2.0
"""`rekindle snapshot`: start a server, warm it, and save it as an image."""

import argparse
import contextlib
from collections.abc import Sequence
from pathlib import Path

from cli import _arguments, _progress, _report, _signing
from oci.progress import Tally
from oci.reference import parse
from rekindle.cell import Network
from rekindle.cell.hook import Reseed
from rekindle.engine.choose import Weights
from rekindle.report import Outcome
from snapshot.flow import snapshot
from snapshot.options import Progress, SnapshotOptions
from snapshot.outside_connections import Outside


def main(words: Sequence[str]) -> int:
    """Run the command and return its exit status."""
    words, command = _arguments.split_command(words)
    args = _parser().parse_args(words)
    report = _report.begin("snapshot", args)
    report.allowed_secrets = sorted(set(args.allow_secret))
    with _report.reporting(report, args):
        options = _options(args, command)
        _arguments.require_root()
        image = snapshot(options, report, _Bar(args))
        if options.sign is None:
            _signing.advise(report, parse(args.image), [])
    saved = f"saved {args.image} {image.index.digest}, {image.size_bytes:,} bytes"
    _report.finish(report, args, Outcome.SAVED, saved)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rekindle snapshot",
        usage="rekindle snapshot IMAGE [options] -- COMMAND…",
        description="Start a server, warm it, check its answer, and save it as an image. The server ends "
        "when its snapshot is made.",
    )
    parser.add_argument("image", metavar="IMAGE", help=_arguments.IMAGE)
    parser.add_argument(
        "--network",
        type=Network,
        choices=list(Network),
        default=Network.PRIVATE,
        help="network of the server: its own, so that replicas do not collide, or the host's "
        "(default: private)",
    )
    parser.add_argument(
        "--ready-timeout",
        type=float,
        default=1800.0,
        metavar="S",
        help="fail unless the server is ready within S seconds (default: 1800)",
    )
    parser.add_argument("--ready-url", metavar="URL", help=_arguments.READY_URL)
    parser.add_argument("--oracle-request", type=Path, metavar="FILE", help=_arguments.ORACLE_REQUEST)
    parser.add_argument(
        "--warm-requests",
        type=Path,
        metavar="FILE",
        help="requests that warm the server, one JSON object per line",
    )
    parser.add_argument(
        "--weights",
        type=Weights,
        choices=list(Weights),
        help="for vLLM on a GPU: keep the weights in the image (default), reload them from the model's files "
        "after a restore, or dump all GPU memory as it is",
    )
    parser.add_argument(
        "--reseed",
        type=Reseed,
        choices=list(Reseed),
        default=Reseed.NONE,
        help="random numbers of Python processes to reseed after a restore: those that the program did not "
        "seed itself, all, or none (default: none)",
    )
    parser.add_argument(
        "--outside",
        type=Outside,
        choices=list(Outside),
        default=Outside.REFUSE,
        help="connections of the server to daemons and other hosts: refuse to snapshot it, or close them in "
        "the image, so that a restored server finds them broken and makes new ones (default: refuse)",
    )
    parser.add_argument(
        "--no-prove", action="store_true", help="publish without restoring the snapshot once as a test"
    )
    parser.add_argument(
        "--no-memory-check",
        action="store_true",
        help="also move GPU state into host memory if less is available, on a machine whose memory grows "
        "when it is used",
    )
    parser.add_argument("--no-cache", action="store_true", help="leave the kernel cache out of the image")
    parser.add_argument(
        "--allow-secret",
        action="append",
        default=[],
        metavar="NAME",
        help="allow this variable, option or kind of token in the image, where all its readers can see it",
    )
    parser.add_argument("--keep-dump", type=Path, metavar="DIR", help=argparse.SUPPRESS)
    _arguments.add_signing(parser)
    _arguments.add_registry(parser)
    _arguments.add_report(parser)
    return parser


def _options(args: argparse.Namespace, command: Sequence[str]) -> SnapshotOptions:
    return SnapshotOptions(
        image=args.image,
        command=tuple(command),
        network=args.network,
        ready_seconds=args.ready_timeout,
        ready_url=args.ready_url,
        oracle_file=args.oracle_request,
        warm_file=args.warm_requests,
        weights=args.weights,
        reseed=args.reseed,
        outside=args.outside,
        prove=not args.no_prove,
        with_cache=not args.no_cache,
        check_memory=not args.no_memory_check,
        secrets=tuple(args.allow_secret),
        sign=_signing.chosen(args),
        private_variables=_signing.VARIABLES,  # the server must not see what gives access to our keys
        registry=_arguments.registry(args),
        keep_dump=args.keep_dump,
    )


class _Bar(Progress):
    def __init__(self, args: argparse.Namespace) -> None:
        self._quiet = args.quiet

    def sending(self, tally: Tally) -> contextlib.AbstractContextManager[None]:
        return _progress.shown(tally, quiet=self._quiet)
