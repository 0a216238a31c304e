# SPDX-License-Identifier: Apache-2.0
"""`rekindle snapshot`: start a server, warm it, and save it as an image."""

import argparse
import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cli import _arguments, _progress, _report, _signing
from oci.image import Image
from oci.progress import Tally
from oci.reference import parse
from rekindle.cell import Network
from rekindle.engine.choose import Weights
from rekindle.errors import UsageError
from rekindle.report import Outcome, Report
from snapshot.flow import snapshot
from snapshot.options import READY_SECONDS, Progress, ReplicaOptions, SnapshotOptions
from snapshot.outside_connections import Outside

if TYPE_CHECKING:
    from oci.trust.signer import Sign

_OF_A_START = (
    *("network", "ready_timeout", "ready_url", "oracle_request", "warm_requests", "weights", "reseed"),
    *("no_cache", "neutral", "keep_dump"),
)
"""The options that say how a server is started."""


def main(words: Sequence[str]) -> int:
    """Run the command and return its exit status."""
    words, command = _arguments.split_command(words)
    args = _parser().parse_args(words)
    report = _report.begin("snapshot", args)
    report.allowed_secrets = sorted(set(args.allow_secret))
    with _report.reporting(report, args):
        sign = _signing.chosen(args)
        if args.pid is not None:
            image = _save_process(args, command, sign, report)
        elif args.replica:
            image = _save_running(args, command, sign, report)
        else:
            options = _options(args, command, sign)
            _arguments.require_root()
            image = snapshot(options, report, _Bar(args))
        if sign is None:
            _signing.advise(report, parse(args.image), [])
    saved = f"saved {args.image} {image.index.digest}, {image.size_bytes:,} bytes"
    _report.finish(report, args, Outcome.SAVED, saved)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _arguments.Parser(
        prog="rekindle snapshot",
        usage="rekindle snapshot IMAGE [options] -- COMMAND…\n"
        "       rekindle snapshot IMAGE --replica NAME [options]\n"
        "       rekindle snapshot IMAGE --pid PID [options]",
        description="Start a server, warm it, check its answer, and save it as an image. The server ends "
        "when its snapshot is made. Or save one that runs already and serves on.",
    )
    parser.add_argument("image", metavar="IMAGE", help=_arguments.IMAGE)
    parser.add_argument(
        "--network",
        type=_arguments.one_of(Network),
        choices=list(Network),
        default=Network.PRIVATE,
        help="network of the server: its own, so that replicas do not collide, or the host's "
        "(default: private)",
    )
    _arguments.add_ready_timeout(parser, READY_SECONDS)
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
        type=_arguments.one_of(Weights),
        choices=list(Weights),
        help="for vLLM on a GPU: keep the weights in the image (default), reload them from the model's files "
        "after a restore, or dump all GPU memory as it is",
    )
    _arguments.add_reseed(parser)
    parser.add_argument(
        "--outside",
        type=_arguments.one_of(Outside),
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
        "--neutral",
        action="store_true",
        help="also save a neutral process, for nodes with other GPUs: the server's Python with its modules "
        "imported, waiting for its command (servers that are Python scripts, such as vllm)",
    )
    parser.add_argument(
        "--allow-secret",
        action="append",
        default=[],
        metavar="NAME",
        help="allow this variable, option or kind of token in the image, where all its readers can see it",
    )
    parser.add_argument("--keep-dump", type=Path, metavar="DIR", help=argparse.SUPPRESS)
    _add_replica(parser)
    _arguments.add_signing(parser)
    _arguments.add_registry(parser)
    _arguments.add_report(parser)
    return parser


def _add_replica(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("a server that runs")
    group.add_argument(
        "--replica", metavar="NAME", help="save this server, of `rekindle ps`, instead of starting one"
    )
    group.add_argument(
        "--pid",
        type=int,
        metavar="PID",
        help="save the server whose root is this process, with its descendants, however it was started; "
        "connections that lead out of it are closed in the image, and not in the server",
    )
    group.add_argument(
        "--drain",
        type=_arguments.seconds,
        default=10.0,
        metavar="S",
        help="with --replica: let new requests wait while those in flight finish, for at most S seconds "
        "(default: 10). One that takes longer goes on afterwards",
    )


def _save_process(
    args: argparse.Namespace, command: Sequence[str], sign: "Sign | None", report: Report
) -> Image:
    """Save a process tree that runs already."""
    from snapshot.foreign import command_of, save_process

    parser = _parser()
    fit = {"ready_url", "oracle_request", "no_cache"}
    given = [
        name for name in _OF_A_START if name not in fit and getattr(args, name) != parser.get_default(name)
    ]
    given += ["replica"] if args.replica else []
    if command or given:
        what = f"--{given[0].replace('_', '-')}" if given else "a COMMAND"
        raise UsageError(f"--pid cannot be combined with {what}", hint="the server has been started already")
    _arguments.require_root()
    options = _options(args, command_of(args.pid), sign)
    return save_process(args.pid, options, report, _Bar(args))


def _save_running(
    args: argparse.Namespace, command: Sequence[str], sign: "Sign | None", report: Report
) -> Image:
    """Save a server that runs already."""
    from snapshot.lent import save_running

    parser = _parser()
    given = [name for name in _OF_A_START if getattr(args, name) != parser.get_default(name)]
    if command or given:
        what = f"--{given[0].replace('_', '-')}" if given else "a COMMAND"
        raise UsageError(
            f"--replica cannot be combined with {what}", hint="the server has been started already"
        )
    options = ReplicaOptions(
        image=args.image,
        runs_on=True,
        outside=args.outside,
        prove=not args.no_prove,
        secrets=tuple(args.allow_secret),
        sign=sign,
        registry=_arguments.registry(args),
    )
    _arguments.require_root()
    return save_running(args.replica, options, report, _Bar(args), drain_seconds=args.drain)


def _options(args: argparse.Namespace, command: Sequence[str], sign: "Sign | None") -> SnapshotOptions:
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
        neutral=args.neutral,
        check_memory=not args.no_memory_check,
        secrets=tuple(args.allow_secret),
        sign=sign,
        registry=_arguments.registry(args),
        keep_dump=args.keep_dump,
    )


class _Bar(Progress):
    def __init__(self, args: argparse.Namespace) -> None:
        self._quiet = args.quiet

    def sending(self, tally: Tally) -> contextlib.AbstractContextManager[None]:
        return _progress.shown(tally, quiet=self._quiet)
