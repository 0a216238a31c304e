# SPDX-License-Identifier: Apache-2.0
"""The report of a command: what people see of it, and where its document is written."""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from rekindle.errors import UsageError
from rekindle.files import write_atomically
from rekindle.report import Outcome, Report, Rung
from rekindle.text import printable


def begin(verb: str, args: argparse.Namespace, *, asked: Rung = Rung.PROCESS) -> Report:
    """Return the report of a command that begins now; its lines go to the standard error, unless --quiet."""
    return Report(verb=verb, asked=asked, tell=console(quiet=args.quiet))


def console(*, quiet: bool) -> Callable[[str], None]:
    """Return what shows people a line."""

    def tell(text: str) -> None:
        if not quiet:
            with contextlib.suppress(OSError):
                print(printable(f"rekindle: {text}"), file=sys.stderr, flush=True)

    return tell


@contextlib.contextmanager
def reporting(report: Report, args: argparse.Namespace) -> Iterator[None]:
    """Write the report when the command fails, too.

    Raises UsageError, before any work, for a file that it cannot be written to.
    """
    path: Path | None = None
    try:
        refuse_unwritable(args.report)
        path = args.report
        yield
    except BaseException as error:
        report.fail(error)
        with contextlib.suppress(OSError):
            write(report, path, to_stdout=False)  # not to one that was refused
        with contextlib.suppress(OSError):
            write(report, None, to_stdout=args.json)
        raise


def finish(report: Report, args: argparse.Namespace, outcome: Outcome, text: str = "") -> None:
    """Write the report of a command that has done what it was asked for, and say so in one line."""
    report.outcome = outcome
    if text:
        report.say(text)
    write(report, args.report, to_stdout=args.json)


def write(report: Report, path: Path | None, *, to_stdout: bool) -> None:
    """Write the document to a file, to the standard output, or to both. Raises OSError."""
    text = json.dumps(report.to_json(), indent=2) + "\n"
    if path is not None:
        _write_file(path, text.encode())
    if to_stdout:
        print(text, end="", flush=True)


def refuse_unwritable(path: Path | None) -> None:
    """Raise UsageError for a report that cannot be written, or would replace /dev/null or the like."""
    if path is None:
        return
    try:
        if path.exists() and not path.is_file():
            raise UsageError(f"--report {path} is not a regular file")
        path.parent.stat()
    except OSError as error:
        raise UsageError(f"--report {path} cannot be written", cause=str(error)) from None
    in_place = path.exists() and os.access(path, os.W_OK)
    if not in_place and (not path.parent.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK)):
        raise UsageError(f"--report {path} cannot be written", cause=f"nor can anything in {path.parent}")


def _write_file(path: Path, content: bytes) -> None:
    """Replace a file atomically. One that cannot be replaced is written in place: a mount of its own, such as
    Kubernetes' /dev/termination-log, refuses the rename, and a read-only directory refuses the staged
    file."""
    try:
        write_atomically(path, content)
    except OSError:
        if not path.is_file():
            raise
        with open(path, "r+b") as file:
            file.truncate(0)
            file.write(content)
