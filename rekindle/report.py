# SPDX-License-Identifier: Apache-2.0
"""What a command did: phases with their times, reasons, bytes, and the oracle's word. See docs/format.md.

A command tells a Report what it is doing; the Report tells people (lines on stderr) and, at the end,
machines (one JSON document). Phases and `unaccounted` add up to the wall time since the process began.
"""

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from rekindle.files import write_atomically
from rekindle.proc import peak_rss_bytes, process_age
from rekindle.text import printable

SCHEMA = "rekindle.report/1"


class Outcome(StrEnum):
    RESTORED = "restored"
    CACHE = "cache"
    COLD = "cold"
    SAVED = "saved"
    FAILED = "failed"


class Rung(StrEnum):
    PROCESS = "process"
    CACHE = "cache"
    COLD = "cold"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reason:
    """Why a rung is not taken: a stable code, the field, and what was recorded and is here.

    A hard reason forbids the rung; a soft one is only told. `recorded` is empty where there is nothing to
    compare. `advice` is what a person can do about it. `by_policy`: a policy made it hard or soft.
    """

    rung: Rung
    code: str
    field: str
    recorded: str
    here: str
    hard: bool
    advice: str = ""
    by_policy: bool = False

    def to_json(self) -> dict[str, Any]:
        return {
            "rung": self.rung,
            "code": self.code,
            "field": self.field,
            "recorded": self.recorded,
            "here": self.here,
            "hard": self.hard,
            "advice": self.advice,
            "by_policy": self.by_policy,
        }

    def __str__(self) -> str:
        if not self.recorded:
            return f"{self.code}: {self.here}"
        return f"{self.code}: {self.field} was {self.recorded}, is {self.here}"


@dataclass(slots=True, kw_only=True)
class Phase:
    name: str
    seconds: float


@dataclass(slots=True, kw_only=True)
class Report:
    """Filled by a command while it runs."""

    verb: str
    asked: Rung = Rung.PROCESS
    outcome: Outcome = Outcome.FAILED
    quiet: bool = False
    image: dict[str, str] = field(default_factory=dict)
    reasons: list[Reason] = field(default_factory=list)
    phases: list[Phase] = field(default_factory=list)
    bytes: dict[str, int] = field(default_factory=dict)
    oracle: dict[str, Any] = field(default_factory=dict)
    cache: dict[str, Any] | None = None
    first_token_seconds: float | None = None
    endpoint: str | None = None
    pid: int | None = None
    error: dict[str, Any] | None = None
    trusted_by: str | None = None
    allowed_secrets: list[str] = field(default_factory=list)
    began: float = field(default_factory=lambda: time.monotonic() - process_age())

    def __post_init__(self) -> None:
        self.phases.append(Phase(name="start", seconds=time.monotonic() - self.began))

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times a step. Phases do not nest."""
        begin = time.monotonic()
        phase = Phase(name=name, seconds=0.0)
        self.phases.append(phase)
        try:
            yield
        finally:
            phase.seconds = time.monotonic() - begin
        self.say(f"{name} {phase.seconds:.2f} s")

    def split_phase(self, name: str, *, at: float) -> None:
        """Divides the phase that has just ended: from `at`, by time.monotonic, it was one of that name."""
        last = self.phases[-1]
        rest = min(last.seconds, max(0.0, time.monotonic() - at))
        last.seconds -= rest
        self.phases.append(Phase(name=name, seconds=rest))

    def say(self, text: str) -> None:
        """Tells a person."""
        if not self.quiet:
            with contextlib.suppress(OSError):
                print(printable(f"rekindle: {text}"), file=sys.stderr, flush=True)

    def to_json(self) -> dict[str, Any]:
        seconds = time.monotonic() - self.began
        return {
            "schema": SCHEMA,
            "verb": self.verb,
            "outcome": self.outcome,
            "asked": self.asked,
            "image": self.image,
            "trust": {"verified": self.trusted_by is not None, "by": self.trusted_by},
            "reasons": [reason.to_json() for reason in self.reasons],
            "phases": [{"name": p.name, "seconds": round(p.seconds, 6)} for p in self.phases],
            "seconds": round(seconds, 6),
            "unaccounted_seconds": round(seconds - sum(p.seconds for p in self.phases), 6),
            "first_token_seconds": self.first_token_seconds and round(self.first_token_seconds, 6),
            "bytes": self.bytes,
            "oracle": self.oracle,
            "cache": self.cache,
            "endpoint": self.endpoint,
            "pid": self.pid,
            "peak_rss_bytes": peak_rss_bytes(),
            "allowed_secrets": self.allowed_secrets,
            "error": self.error,
        }

    def write(self, path: Path | None, *, to_stdout: bool) -> None:
        """Writes the document where it was asked for."""
        text = json.dumps(self.to_json(), indent=2) + "\n"
        if path is not None:
            write_atomically(path, text.encode())
        if to_stdout:
            print(text, end="", flush=True)
