# SPDX-License-Identifier: Apache-2.0
"""Run a command in the background: return to the caller once its server is ready.

The command goes on in a child, in a session of its own. Until its server is ready it writes to the caller's
terminal as it would in the foreground, errors included; the server writes to the replica's log from the
start. Then it lets go of the caller's descriptors, so that nobody who waits for their end waits for it.
"""

import argparse
import contextlib
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from cli import _replica_options, _report
from rekindle import log
from rekindle.errors import Interrupted, UsageError
from rekindle.fields import JSON
from rekindle.home import Home
from rekindle.replicas import Registration, register
from rekindle.report import Outcome, Report, Rung

LOWER_STATUS = 3  # restore.flow.LOWER_STATUS, which takes long to import
_OUTCOMES = {
    Rung.PROCESS: Outcome.RESTORED,
    Rung.NEUTRAL: Outcome.NEUTRAL,
    Rung.CACHE: Outcome.CACHE,
    Rung.COLD: Outcome.COLD,
}
_READ_BYTES = 1 << 16


class Detached:
    """The side of the child, the one with this index among the replicas of a command."""

    def __init__(self, registration: Registration, told: int, index: int) -> None:
        self.registration, self._told, self.index = registration, told, index

    def enter(self) -> None:
        """Leave the caller's session, and let the server write to the log."""
        os.setsid()
        kept = {0, 1, 2, self._told, self.registration.fileno()}
        for entry in list(Path("/proc/self/fd").iterdir()):
            if (fd := int(entry.name)) not in kept:
                with contextlib.suppress(OSError):
                    os.close(fd)
        sys.stdout, sys.stderr = _stream(os.dup(1)), _stream(os.dup(2))
        log = os.open(self.registration.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        nothing = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        for fd, source in ((0, nothing), (1, log), (2, log)):
            os.dup2(source, fd)
        os.close(log)
        os.close(nothing)
        self.registration.take_over()

    def tell(self, report: Report) -> None:
        """Give the caller the report."""
        with contextlib.suppress(OSError):  # it may have been killed
            content = memoryview(json.dumps(report.to_json()).encode())
            while content:
                content = content[os.write(self._told, content) :]

    def ready(self, report: Report) -> None:
        """Tell the caller that the server is ready, or has exited before, and let go of its terminal."""
        if report.error is not None:
            log.write_error(f"{report.error.message} (rekindle logs {self.registration.name})")
        self.tell(report)
        theirs = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = _stream(1), _stream(2)
        for stream in theirs:
            with contextlib.suppress(OSError):
                stream.close()
        os.close(self._told)


class _Child:
    """The side of the caller."""

    def __init__(self, pid: int, heard: int) -> None:
        self._pid, self._heard = pid, heard
        self._status: int | None = None

    def wait(self) -> tuple[int, JSON]:
        """Wait until the server is ready or the child has ended; return the exit status, and the report."""
        content = b""
        while piece := os.read(self._heard, _READ_BYTES):
            content += piece
        report = json.loads(content) if content else None
        if report is None or report["outcome"] == Outcome.FAILED:
            return self.end(None), report
        is_as_asked = report["outcome"] in {Outcome.STARTED, _OUTCOMES[report["asked"]]}
        return (0 if is_as_asked else LOWER_STATUS), report

    def end(self, signum: int | None) -> int:
        """Wait for the child's end, after a signal if one is given; return its exit status."""
        if self._status is None:
            if signum is not None:
                os.kill(self._pid, signum)
            code = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
            self._status = code if code >= 0 else 128 - code
        return self._status


def begin(args: argparse.Namespace, command: Sequence[str] = (), *, wakes: bool = False) -> Detached | int:
    """Go on in a child for each replica: return its side there, and the exit status in the caller."""
    count = args.replicas or 1
    if not args.detach:
        raise UsageError("--replicas needs --detach")
    for option in ("--report", "--ready-file"):
        if count > 1 and getattr(args, option[2:].replace("-", "_")):
            raise UsageError(f"{option} is for a single replica", hint="--json prints the reports of all")
    home = Home.from_environment()
    children: list[_Child] = []
    try:
        for index in range(count):
            name = args.name if count == 1 or not args.name else f"{args.name}-{index + 1}"
            registration = register(
                home,
                name,
                args.image,
                detached=True,
                options=_replica_options.words(args) if args.image else (),
                command=command,
                wakes=wakes,
            )
            heard, told = os.pipe()
            pid = os.fork()
            if pid == 0:
                return _begin_child(args, registration, told, index)
            os.close(told)
            os.close(registration.fileno())
            children.append(_Child(pid, heard))
        found = [child.wait() for child in children]
    except BaseException as error:
        for child in children:
            child.end(error.signum if isinstance(error, Interrupted) else signal.SIGTERM)
        raise
    reports = [report for _, report in found if report is not None]
    if not args.json:
        for report in reports:
            if report["outcome"] != Outcome.FAILED:
                print(report["replica"])
    elif count > 1 or reports:
        _report.print_document(reports[0] if count == 1 else {"replicas": reports})
    return next((status for status, _ in found if status), 0)


def _begin_child(args: argparse.Namespace, registration: Registration, told: int, index: int) -> Detached:
    detached = Detached(registration, told, index)
    detached.enter()
    args.json = False  # the caller prints the report
    if index and args.require is None:
        args.require = Rung.PROCESS  # servers of lower rungs would all bind the port of the first
    return detached


def _stream(fd: int) -> TextIO:
    return os.fdopen(fd, "w", encoding="utf-8", errors="backslashreplace", buffering=1)
