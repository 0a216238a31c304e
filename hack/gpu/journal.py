# SPDX-License-Identifier: Apache-2.0
"""What a run of the acceptance knows so far, on the disk.

    WORK/results.json       the result of every step that was tried; a later run with this directory reads it
    OUT/report.json         the same as a document, without the paths of this machine
    OUT/report.md           that document as Markdown
    OUT/log.txt             the ends of all logs

All of them are written anew after every step, so that an end at any time leaves what was done by then.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hack.gpu import report
from rekindle.fields import JSON

SCHEMA = "rekindle.gpu-acceptance/1"
_ROOT = Path(__file__).parents[2]
_LOG_BYTES = 40_000  # of each log, in log.txt

Found = dict[str, JSON]
"""What a step has found out; JSON values only."""


@dataclass(slots=True, kw_only=True)
class Journal:
    """The results of the steps by their names. `options` are told in the report."""

    work: Path
    out: Path
    logs: Path
    steps: Sequence[str]
    options: Mapping[str, JSON]
    results: dict[str, Found] = field(default_factory=dict)

    def load(self) -> None:
        """Take over what an earlier run with this work directory found."""
        known = self.work / "results.json"
        if known.exists():
            self.results = json.loads(known.read_bytes())

    def status(self, step: str) -> str:
        """Return `done`, `failed` or `skipped`; empty for a step that was not tried."""
        return str(self.results.get(step, {}).get("status", ""))

    def write(self) -> None:
        """Write all files as of now."""
        unknown = {"status": "skipped", "reason": "not asked for, or not yet", "seconds": 0.0}
        document = {
            "schema": SCHEMA,
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "options": self.options,
            "steps": {step: self.results.get(step, unknown) for step in self.steps},
        }
        (self.work / "results.json").write_text(json.dumps(self.results))
        text = json.dumps(document, indent=1) + "\n"
        for path, name in ((self.work, "WORK"), (_ROOT, "REKINDLE"), (Path.home(), "~")):
            text = text.replace(json.dumps(str(path))[1:-1], name)
        (self.out / "report.json").write_text(text)
        (self.out / "report.md").write_text(report.render(json.loads(text)))
        with open(self.out / "log.txt", "wb") as file:
            for log in sorted(self.logs.iterdir()):
                file.write(f"==== {log.name}\n".encode() + log.read_bytes()[-_LOG_BYTES:] + b"\n")


def kept(path: Path, text: str) -> str:
    """Return what an earlier run wrote to the file; without one, write the text for later runs."""
    if not path.exists():
        path.write_text(text)
    return path.read_text()
