# SPDX-License-Identifier: Apache-2.0
"""What the commands' command lines have in common."""

import argparse
import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from oci.layout import Layout
from oci.reference import Reference
from rekindle import criu
from rekindle.engine import Endpoint
from rekindle.errors import CapabilityError, Interrupted, RekindleError, UsageError
from rekindle.home import Home
from rekindle.report import Report


def split_command(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """What stands before the first `--`, and the command after it."""
    words = list(words)
    if "--" not in words:
        return words, []
    at = words.index("--")
    return words[:at], words[at + 1 :]


def add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the report as one JSON document")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the report to a file")
    parser.add_argument("--quiet", action="store_true", help="say nothing but errors")


@contextlib.contextmanager
def reporting(report: Report, args: argparse.Namespace) -> Iterator[None]:
    """Writes the report when the command fails, too."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, RekindleError):
            report.error = {"code": error.code, "message": error.message}
            report.error |= {"cause": error.cause, "hint": error.hint}
        elif isinstance(error, Interrupted):
            report.error = {"code": "interrupted", "message": f"ended by signal {error.signum}"}
        else:
            report.error = {"code": "bug", "message": repr(error)}
        with contextlib.suppress(OSError):
            report.write(args.report, to_stdout=args.json)
        raise


def require_root() -> None:
    """Raises CapabilityError for anybody but root: cells and CRIU need it."""
    if os.geteuid() != 0:
        raise CapabilityError(
            "this needs root", cause="namespaces and CRIU do", hint="run it with sudo, or as root"
        )


def open_home() -> Home:
    """$REKINDLE_HOME, after what a killed command left there has been removed."""
    home = Home.from_environment()
    sweep(home)
    return home


def sweep(home: Home) -> list[Path]:
    """Removes what killed commands left; returns their work directories."""
    try:
        removed = home.sweep()
        if removed:
            criu.remove_leftovers()
        store = Layout(home.store)
        if store.has_garbage():
            store.collect_garbage()
    except PermissionError:  # somebody else's home: its owner's commands will do it
        return []
    return removed


def layout_of(image: Reference, home: Home, *, create: bool = False) -> Layout:
    """The layout that an image is in. Raises UsageError for a directory that is no layout."""
    if image.directory is None:
        return Layout.create(home.store)
    if create:
        return Layout.create(image.directory)
    if not (image.directory / "oci-layout").exists():
        raise UsageError(f"{image.directory} is no OCI image layout")
    return Layout(image.directory)


def parse_endpoint(text: str, default_host: str) -> Endpoint:
    """`PORT`, `HOST:PORT` or `[HOST]:PORT`. Raises UsageError."""
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not port.isdecimal() or not 0 < int(port) < 65536 or (colon and not host):
        raise UsageError(f"--publish {text} is not of the form [HOST:]PORT")
    return Endpoint(host=host or default_host, port=int(port))
