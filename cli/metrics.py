# SPDX-License-Identifier: Apache-2.0
"""`rekindle metrics`: print or serve metrics for Prometheus, or write them to a file."""

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cli import _arguments, _report
from rekindle.errors import CapabilityError, Interrupted, PortError
from rekindle.home import Home

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry


def main(words: Sequence[str]) -> int:
    """Run the command and return its exit status."""
    args = _parser().parse_args(words)
    home = Home.from_environment()
    try:
        from prometheus_client import generate_latest

        from cli._metrics import registry
    except ImportError as error:
        raise CapabilityError(
            "metrics need prometheus-client", cause=str(error), hint="pip install 'rekindle-llm[metrics]'"
        ) from None
    found = registry(home)
    try:
        if args.listen:
            return _serve(found, *args.listen)
        if args.file is None:
            sys.stdout.buffer.write(generate_latest(found))
            return 0
        _report.refuse_unwritable(args.file, "--file")
        while True:
            _report.write_file(args.file, generate_latest(found))
            if args.every is None:
                return 0
            time.sleep(args.every)
    except Interrupted as interrupted:
        if interrupted.signum == signal.SIGTERM:  # as a service is stopped
            return 0
        raise


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rekindle metrics",
        formatter_class=_arguments.Formatter,
        description="Print metrics of this $REKINDLE_HOME in Prometheus' format: restores by rung and "
        "reason, phases, bytes, failures, replicas with their memory. Needs prometheus-client.",
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--listen",
        type=_address,
        metavar="[HOST:]PORT",
        help="serve them over HTTP at this address (HOST: 127.0.0.1 by default) until a signal comes",
    )
    where.add_argument(
        "--file",
        type=Path,
        metavar="FILE",
        help="replace FILE, for the textfile collector of Prometheus' node exporter",
    )
    parser.add_argument(
        "--every", type=_arguments.seconds, metavar="S", help="with --file: replace it every S seconds"
    )
    return parser


def _serve(found: "CollectorRegistry", host: str, port: int) -> int:
    from prometheus_client import start_http_server

    tell = _report.console(quiet=False)
    try:
        server, thread = start_http_server(port, host, found)
    except OSError as error:
        raise PortError(f"cannot listen on {host}:{port}", cause=str(error)) from None
    shown = f"[{host}]" if ":" in host else host
    tell(f"metrics on http://{shown}:{server.server_port}/metrics")
    try:
        thread.join()
    finally:
        server.shutdown()
    return 0


def _address(text: str) -> tuple[str, int]:
    """Parse `[HOST:]PORT`; an IPv6 address stands in brackets."""
    host, _, port = text.rpartition(":")
    if not port.isdecimal() or int(port) > 65535:
        raise argparse.ArgumentTypeError(f"invalid address '{text}'")
    return host.removeprefix("[").removesuffix("]") or "127.0.0.1", int(port)
