# SPDX-License-Identifier: Apache-2.0
"""Do for those who watch what a command need not wait for: keep its report, and export it as spans.

`restore` and `run` do this in a thread once the server is ready and everybody has been told; other commands
at their end. Nothing here fails a command.
"""

import contextlib
import os
import sys
import time
from collections.abc import Mapping

from rekindle import log
from rekindle.errors import RekindleError
from rekindle.fields import JSON
from rekindle.home import Home
from rekindle.report import Report
from rekindle.run import ask

_EXPORT_SECONDS = 10.0
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")


class Afterwards:
    """Keep and export a report, as it is now."""

    def __init__(self, report: Report, *, wakes: bool = False) -> None:
        self._report, self._wakes = report, wakes
        self._document, self._at = report.to_json(), time.time()

    def run(self) -> None:
        """Keep the report in the home, if that can be written, and export it, if that is configured."""
        from rekindle import history  # a start does not wait for its import

        try:
            with contextlib.suppress(OSError, RekindleError):  # such as a home that is read-only
                history.add(Home.from_environment(), self._document, at=self._at, wakes=self._wakes)
            if exports():
                with contextlib.suppress(OSError):
                    _export(self._document, self._at)
        except Exception as error:
            self._report.say_bug(error)


def exports() -> bool:
    """Tell whether the standard variables of OpenTelemetry say where to send spans."""
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return False
    if os.environ.get("OTEL_TRACES_EXPORTER", "otlp") != "otlp":
        return False
    return any(os.environ.get(name) for name in _ENDPOINTS)


def _export(document: Mapping[str, JSON], at: float) -> None:
    """Send spans in a process of its own: its imports would take the time of the server's clients here."""
    import json

    content = json.dumps({"report": document, "at": at}).encode()
    argv = [sys.executable, "-P", "-m", "cli._export_spans"]
    status, _ = ask(argv, content, timeout=_EXPORT_SECONDS)
    if status == 124:
        log.write(f"WARNING: the spans were not exported within {_EXPORT_SECONDS:.0f} s")
