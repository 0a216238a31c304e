# SPDX-License-Identifier: Apache-2.0
"""Show how it goes with a server that is brought up, in the foreground or detached."""

import argparse
import contextlib
from typing import TYPE_CHECKING

from cli import _report
from cli._afterwards import Afterwards
from rekindle.report import Report
from restore.listener import Listener

if TYPE_CHECKING:
    from cli._detach import Detached
    from oci.progress import Tally


class Console(Listener):
    """Print lines and progress to stderr, and write the report where it was asked for."""

    def __init__(self, args: argparse.Namespace, detached: "Detached | None", *, wakes: bool = False) -> None:
        self._args, self._detached, self._wakes = args, detached, wakes
        self._afterwards: Afterwards | None = None
        self._tell = _report.console(quiet=args.quiet)

    def say(self, text: str) -> None:
        self._tell(text)

    def progress(self, tally: "Tally | None") -> contextlib.AbstractContextManager[None]:
        if tally is None:
            return contextlib.nullcontext()
        from cli._progress import shown

        return shown(tally, quiet=self._args.quiet)

    def ready(self, report: Report) -> None:
        self._afterwards = Afterwards(report, wakes=self._wakes)
        try:
            _report.write(report, self._args.report, to_stdout=self._args.json)
        except OSError as error:  # the running server matters more than its report
            report.say(f"WARNING: cannot write the report: {error}")
        if self._detached is not None:
            self._detached.ready(report)

    def announced(self, report: Report) -> None:  # noqa: ARG002
        assert self._afterwards is not None
        self._afterwards.run()

    def interrupted(self, report: Report) -> None:
        with contextlib.suppress(OSError):
            _report.write(report, self._args.report, to_stdout=False)

    def failed(self, report: Report) -> None:
        self.interrupted(report)
        if self._detached is not None:
            self._detached.tell(report)
        with contextlib.suppress(OSError):
            _report.write(report, None, to_stdout=self._args.json)
        Afterwards(report, wakes=self._wakes).run()
