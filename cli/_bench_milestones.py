# SPDX-License-Identifier: Apache-2.0
"""Divide a start of a server into phases, by what its log shows."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rekindle.engine import Engine


class Milestones:
    """Divide a start into phases by texts that appear in the server's log."""

    def __init__(self, engine: Engine, logs: Sequence[Path], began: float) -> None:
        self._waiting = list(engine.milestones())
        self._logs = logs
        self._last = began
        self.phases: dict[str, float] = {}

    def update(self) -> None:
        """Mark the phases that the log shows to be over."""
        if self._waiting:
            text = "".join(path.read_text(errors="replace") for path in self._logs if path.exists())
            while self._waiting and self._waiting[0][1] in text:
                self.mark(self._waiting.pop(0)[0])

    def mark(self, name: str, at: float | None = None) -> None:
        """End a phase now, or at a time of time.monotonic."""
        now = time.monotonic() if at is None else at
        self.phases[name] = now - self._last
        self._last = now


def with_milestones(document: dict[str, Any], milestones: Mapping[str, float]) -> dict[str, Any]:
    """Divide the phase `server` of a report, if it has one, into those that the server's log shows.

    `milestones` are seconds, the first of them since rekindle was started.
    """
    phases, before = [], 0.0
    for phase in document["phases"]:
        left = phase["seconds"]
        if phase["name"] == "server":
            for name, seconds in milestones.items():
                took = min(left, max(0.0, seconds - before))
                phases.append({"name": name, "seconds": took})
                left, before = left - took, 0.0
            phases.append({"name": "ready" if milestones else "server", "seconds": left})
        else:
            phases.append(phase)
            before += left
    return {**document, "phases": phases}
