# SPDX-License-Identifier: Apache-2.0
"""Announce the state of a server: to the platform by sd_notify and a file, to the caller by the report."""

import signal
from collections.abc import Sequence
from pathlib import Path

from rekindle.replicas import Registration
from rekindle.report import Failure, Outcome, Report, Rung
from restore.listener import Listener
from restore.serve import notify

_HOW = {
    Rung.PROCESS: "restored",
    Rung.NEUTRAL: "from a neutral process",
    Rung.CACHE: "on the kernel cache",
    Rung.COLD: "cold",
}
"""The outcome of a start on each rung."""


def say_addresses(report: Report) -> None:
    """Print which further ports of the server are published, and which are not."""
    further = [each for each in report.addresses if not each.published or each.published != report.endpoint]
    for each in further:
        if each.problem:
            report.say(f"WARNING: the server's {each.server} is not published: {each.problem}")
    if also := [each.shown for each in further if each.published]:
        report.say(f"also on {', '.join(also)}")
    if left := [each.server for each in further if not each.published and not each.problem]:
        report.say(f"not published: {', '.join(left)} of the server (--publish PORT:SERVERPORT)")


class Announcer:
    """Announces once that the server is ready, and once that it stops."""

    def __init__(
        self,
        report: Report,
        listener: Listener,
        ready_file: Path | None,
        registration: Registration | None = None,
    ) -> None:
        self._registration = registration
        self._report = report
        self._listener = listener
        self._ready_file = ready_file
        self._is_ready = False

    def say_ready(self, rung: Rung) -> None:
        """Print on which rung the server is ready, and how much of its kernel cache it used."""
        report = self._report
        first = report.first_token_seconds
        after = f" after {first:.2f} s to the first token" if first else ""
        published = [report.endpoint, *(each.published for each in report.addresses)]
        where = next((each for each in published if each), "its address")
        report.say(f"ready ({_HOW[rung]}) on {where}{after}")
        say_addresses(report)
        if report.cache is not None:
            cache = report.cache
            report.say(
                f"kernel cache: {cache.verdict}; {cache.used} of {cache.entries} entries used, "
                f"{cache.made} compiled again"
            )

    def register(self, rung: Rung, cell_init: int | None, keys: Sequence[str]) -> None:
        """Note in the replica's entry that the server is ready, and the PID of its cell's init.

        `keys` are the API keys of which clients need one.
        """
        if self._registration is not None:
            self._registration.ready(
                rung=rung,
                digest=str(self._report.image.digest) if self._report.image else "",
                endpoint=self._report.endpoint or "",
                cell_init=cell_init,
                keys=keys,
            )

    def ready(self) -> None:
        """Tell the platform that the server is ready."""
        self._is_ready = True
        notify.ready(self._ready_file)
        if self._ready_file is not None and not self._ready_file.exists():
            self._report.say(f"WARNING: cannot create --ready-file {self._ready_file}")

    def stopping(self) -> None:
        """Tell the platform to send no more requests. Idempotent."""
        if self._is_ready:
            self._is_ready = False
            notify.stopping(self._ready_file)
            if self._registration is not None:
                self._registration.stopping()

    def asked_to_end(self, signum: int) -> None:
        """Report a signal at once: the platform that sent it may not wait for the clean-up."""
        if self._report.outcome is Outcome.FAILED:
            self._report.error = Failure.by_signal(signum)
            self._listener.interrupted(self._report)
        elif signum != signal.SIGHUP:  # makes some servers reload their configuration
            self.stopping()
