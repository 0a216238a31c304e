# SPDX-License-Identifier: Apache-2.0
"""Keep what the commands of this home have done: totals since its first command, and the newest reports.

    $REKINDLE_HOME/history/
        totals.json                         the document of Totals
        reports/NANOSECONDS-VERB-PID.json   the newest fifty reports, a document of KeptReport each
        lock                                held briefly while a report is added

Each command adds its report when it is done, and `restore` when its server is ready. Both files are replaced
whole, but not durably: after a power failure totals may begin anew, which whoever reads counters expects. A
command that is killed before it is done adds nothing.
"""

import bisect
import contextlib
import itertools
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct, field

from rekindle.errors import IntegrityError, TrustError
from rekindle.fields import JSON
from rekindle.files import locked
from rekindle.home import Home
from rekindle.report import Outcome

SCHEMA = "rekindle.history/1"
BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
"""The upper bounds of the buckets of a distribution, in seconds."""

COUNTED = {
    "commands": ("verb", "outcome"),
    "errors": ("verb", "code"),
    "verification_failures": ("verb", "code"),
    "restores": ("outcome", "asked"),
    "reasons": ("rung", "code", "hard"),
    "wakes": ("outcome",),
    "bytes": ("verb", "kind"),
    "kernel_cache_starts": ("verdict",),
    "kernel_cache_entries": ("use",),
}
"""What is counted, and by which labels."""

TIMED = {
    "command_seconds": ("verb", "outcome"),
    "phase_seconds": ("verb", "phase"),
    "first_token_seconds": ("outcome",),
    "pause_seconds": (),
}
"""What is timed, and by which labels."""

_VERIFICATION = {TrustError.code, IntegrityError.code}
_KEPT = 50
_LOCK_SECONDS = 5.0
_NAME = re.compile(r"\d+-[a-z-]+-\d+\.json")


class Total(Struct, kw_only=True):
    """A count of something, or an amount of it."""

    name: str
    labels: tuple[str, ...]
    value: int = 0


class Distribution(Struct, kw_only=True):
    """Times that something took: how many are in each of the buckets and above them, and the sum."""

    name: str
    labels: tuple[str, ...]
    counts: list[int]
    sum_seconds: float = 0.0


class Totals(Struct, kw_only=True):
    """The totals of a home since a time in seconds since 1970.

    Labels are in the order of COUNTED and TIMED.
    """

    schema: str = SCHEMA
    since: float = 0.0
    counts: list[Total] = field(default_factory=list)
    times: list[Distribution] = field(default_factory=list)

    def count(self, name: str, *labels: str, by: int = 1) -> None:
        """Add to a count."""
        found = next((each for each in self.counts if (each.name, each.labels) == (name, labels)), None)
        if found is None:
            found = Total(name=name, labels=labels)
            self.counts.append(found)
        found.value += by

    def time(self, name: str, *labels: str, seconds: float) -> None:
        """Add to a distribution."""
        found = next((each for each in self.times if (each.name, each.labels) == (name, labels)), None)
        if found is None:
            found = Distribution(name=name, labels=labels, counts=[0] * (len(BUCKETS) + 1))
            self.times.append(found)
        found.counts[bisect.bisect_left(BUCKETS, seconds)] += 1
        found.sum_seconds = round(found.sum_seconds + seconds, 6)


class KeptReport(Struct, frozen=True, kw_only=True):
    """A report, when it was made in seconds since 1970, and whether it is of a wake."""

    schema: str = SCHEMA
    at: float
    wakes: bool = False
    report: dict[str, Any]


def add(home: Home, report: Mapping[str, JSON], *, at: float, wakes: bool = False) -> None:
    """Add the report of a command to the totals, and keep it.

    Raises OSError, and BusyError if others add theirs for too long.
    """
    reports = home.history / "reports"
    reports.mkdir(mode=0o700, parents=True, exist_ok=True)
    with locked(home.history / "lock", timeout=_LOCK_SECONDS):
        totals = read_totals(home)
        totals.since = totals.since or time.time()
        _count(totals, report, wakes=wakes)
        _replace(home.history / "totals.json", totals)
        kept = KeptReport(at=at, wakes=wakes, report=dict(report))
        _replace(reports / f"{time.time_ns()}-{report['verb']}-{os.getpid()}.json", kept)
        for old in sorted(_files(home))[:-_KEPT]:
            old.unlink(missing_ok=True)


def read_totals(home: Home) -> Totals:
    """Return the totals; empty ones if there are none, or none that can be read."""
    with contextlib.suppress(OSError, msgspec.DecodeError):
        totals = msgspec.json.decode((home.history / "totals.json").read_bytes(), type=Totals)
        if all(len(each.counts) == len(BUCKETS) + 1 for each in totals.times):
            return totals
    return Totals()


def newest(home: Home, limit: int, verb: str | None = None) -> list[KeptReport]:
    """Return the newest reports that are kept, of one command if `verb` is given; the newest first."""
    files = (path for path in sorted(_files(home), reverse=True) if verb in {None, _verb(path)})
    return list(itertools.islice(_readable(files), limit))


def _readable(files: Iterator[Path]) -> Iterator[KeptReport]:
    for path in files:
        with contextlib.suppress(OSError, msgspec.DecodeError):  # removed meanwhile, or torn
            yield msgspec.json.decode(path.read_bytes(), type=KeptReport)


def _files(home: Home) -> list[Path]:
    with contextlib.suppress(OSError):
        return [path for path in (home.history / "reports").iterdir() if _NAME.fullmatch(path.name)]
    return []


def _verb(path: Path) -> str:
    return path.stem.partition("-")[2].rpartition("-")[0]


def _replace(path: Path, document: Struct) -> None:
    """Replace a file of ours. The caller holds the lock, so one staged name is enough."""
    staged = path.with_name(f".{path.name}")
    fd = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with open(fd, "wb") as file:
        file.write(msgspec.json.encode(document, enc_hook=str))
    staged.replace(path)


def _count(totals: Totals, report: Mapping[str, Any], *, wakes: bool) -> None:
    """Add what a report says to the totals."""
    verb, outcome = str(report["verb"]), str(report["outcome"])
    totals.count("commands", verb, outcome)
    totals.time("command_seconds", verb, outcome, seconds=report["seconds"])
    for phase in report["phases"]:
        totals.time("phase_seconds", verb, phase["name"], seconds=phase["seconds"])
    for kind, number in report["bytes"].items():
        totals.count("bytes", verb, kind, by=number)
    if outcome == Outcome.FAILED and (error := report["error"]):
        totals.count("errors", verb, error["code"])
        if error["code"] in _VERIFICATION:
            totals.count("verification_failures", verb, error["code"])
    if verb == "restore":
        totals.count("restores", outcome, str(report["asked"]))
        for reason in report["reasons"]:
            totals.count("reasons", reason["rung"], reason["code"], str(reason["hard"]).lower())
        if seconds := report["first_token_seconds"]:
            totals.time("first_token_seconds", outcome, seconds=seconds)
        if wakes:
            totals.count("wakes", outcome)
        if cache := report["cache"]:
            totals.count("kernel_cache_starts", cache["verdict"])
            totals.count("kernel_cache_entries", "used", by=cache["used"])
            totals.count("kernel_cache_entries", "compiled", by=cache["made"])
    if pause := report["pause"]:
        totals.time("pause_seconds", seconds=pause["seconds"])
