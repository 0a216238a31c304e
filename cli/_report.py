# SPDX-License-Identifier: Apache-2.0
"""Report what a command does: lines on stderr, and a JSON document to a file or stdout."""

import argparse
import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from cli._afterwards import Afterwards
from rekindle import log
from rekindle.errors import UsageError
from rekindle.fields import JSON
from rekindle.files import write_atomically
from rekindle.report import Outcome, Report, Rung


def begin(verb: str, args: argparse.Namespace, *, asked: Rung = Rung.PROCESS) -> Report:
    """Return the report of a command that begins now. Its lines go to stderr, unless --quiet."""
    return Report(verb=verb, asked=asked, tell=console(quiet=args.quiet))


def console(*, quiet: bool) -> Callable[[str], None]:
    """Return a function that prints a line to stderr, or nothing if `quiet`."""

    def tell(text: str) -> None:
        if not quiet:
            log.write(text)

    return tell


@contextlib.contextmanager
def reporting(report: Report, args: argparse.Namespace) -> Iterator[None]:
    """Write the report if the command fails within the context.

    Raises UsageError at the start if the report cannot be written to its file.
    """
    path: Path | None = None
    try:
        refuse_unwritable(args.report)
        path = args.report
        yield
    except BaseException as error:
        report.fail(error)
        with contextlib.suppress(OSError):
            write(report, path, to_stdout=False)  # `path` is None if --report was refused
        with contextlib.suppress(OSError):
            write(report, None, to_stdout=args.json)
        Afterwards(report).run()
        raise


def finish(report: Report, args: argparse.Namespace, outcome: Outcome, text: str = "") -> None:
    """Write the report of a command that succeeded, and print `text` as its last line."""
    report.outcome = outcome
    if text:
        report.say(text)
    write(report, args.report, to_stdout=args.json)
    Afterwards(report).run()


def write(report: Report, path: Path | None, *, to_stdout: bool) -> None:
    """Write the report to a file, atomically where possible, to stdout, or to both. Raises OSError."""
    document = report.to_json()
    if path is not None:
        write_document(path, document)
    if to_stdout:
        print_document(document)


def print_document(document: JSON) -> None:
    """Print one JSON document to stdout. Raises OSError."""
    print(json.dumps(document, indent=2), flush=True)


def write_document(path: Path, document: JSON) -> None:
    """Write one JSON document to a file, as `write_file` does. Raises OSError."""
    write_file(path, (json.dumps(document, indent=2) + "\n").encode())


def refuse_unwritable(path: Path | None, option: str = "--report") -> None:
    """Raise UsageError if the file of an option cannot be written, or is a device."""
    if path is None:
        return
    try:
        if path.exists() and not path.is_file():
            raise UsageError(f"{option} {path} is not a regular file")
        path.absolute().parent.stat()  # absolute() raises if the working directory is gone
    except OSError as error:
        raise UsageError(f"cannot write {option} {path}", cause=str(error)) from None
    in_place = path.exists() and os.access(path, os.W_OK)
    if not in_place and (not path.parent.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK)):
        raise UsageError(f"cannot write {option} {path}", cause=f"{path.parent} is not a writable directory")


def write_file(path: Path, content: bytes) -> None:
    """Replace a file atomically, or write it in place if it cannot be replaced. Raises OSError.

    A file that is a mount, such as Kubernetes' /dev/termination-log, refuses the rename, and a read-only
    directory refuses the staged file. A link such as /dev/stdout stays, and its target is written.
    """
    if not path.is_symlink():
        try:
            return write_atomically(path, content)
        except OSError:
            if not path.is_file():
                raise
    with open(path, "wb") as file:
        file.write(content)
    return None
