# SPDX-License-Identifier: Apache-2.0
"""The report of a command: where it is written, and what it says of a failure."""

import argparse
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from rekindle.errors import Interrupted, RekindleError, UsageError
from rekindle.os_errors import from_outside
from rekindle.report import Report


@contextlib.contextmanager
def reporting(report: Report, args: argparse.Namespace) -> Iterator[None]:
    """Writes the report when the command fails, too. Raises UsageError, before any work, for a file that it
    cannot be written to."""
    path: Path | None = None
    try:
        _refuse_unwritable(args.report)
        path = args.report
        yield
    except BaseException as error:
        told = from_outside(error) if isinstance(error, OSError) else error
        if isinstance(told, RekindleError):
            report.error = {"code": told.code, "message": told.message}
            report.error |= {"cause": told.cause, "hint": told.hint}
        elif isinstance(error, Interrupted):
            report.error = {"code": "interrupted", "message": f"ended by signal {error.signum}"}
        else:
            report.error = {"code": "bug", "message": repr(error)}
        with contextlib.suppress(OSError):
            report.write(path, to_stdout=False)  # not to one that was refused
        with contextlib.suppress(OSError):
            report.write(None, to_stdout=args.json)
        raise


def _refuse_unwritable(path: Path | None) -> None:
    """Also refuses /dev/null and the like, which the report would replace."""
    if path is None:
        return
    try:
        if path.exists() and not path.is_file():
            raise UsageError(f"--report {path} is no regular file")
        path.parent.stat()
    except OSError as error:
        raise UsageError(f"--report {path} cannot be written", cause=str(error)) from None
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise UsageError(f"--report {path} cannot be written", cause=f"nor can anything in {path.parent}")
