# SPDX-License-Identifier: Apache-2.0
"""The results of the acceptance test so far, on disk.

    WORK/results.json       the result of every step that ran; a later run with the same WORK reads it
    OUT/report.json         all results, without paths of this machine
    OUT/report.md           the same in Markdown
    OUT/probes.jsonl        the answers of the probes, a line of JSON each
    OUT/log.txt             the end of every log

All files are rewritten after every step, so that an interrupted run keeps what it has.
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
_LOGS = 200

Found = dict[str, JSON]
"""The findings of a step; JSON values only."""


@dataclass(slots=True, kw_only=True)
class Journal:
    """The results by the names of the steps. `options` appear in the report."""

    work: Path
    out: Path
    logs: Path
    steps: Sequence[str]
    options: Mapping[str, JSON]
    results: dict[str, Found] = field(default_factory=dict)

    def load(self) -> None:
        """Read the results of an earlier run with this work directory, if there was one."""
        known = self.work / "results.json"
        if known.exists():
            self.results = json.loads(known.read_bytes())

    def status(self, step: str) -> str:
        """Return `done`, `failed`, `skipped` or `unfinished`, or "" if the step did not run."""
        return str(self.results.get(step, {}).get("status", ""))

    def write(self) -> None:
        """Write the results and the report."""
        unknown = {"status": "skipped", "reason": "not requested, or not run yet", "seconds": 0.0}
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
        probes = json.loads(text)["steps"].get("probes", {}).get("probes", [])
        lines = "".join(f"{json.dumps(each)}\n" for each in probes)
        (self.out / "probes.jsonl").write_text(lines)
        with open(self.out / "log.txt", "wb") as file:
            for log in sorted(self.logs.iterdir())[:_LOGS]:
                file.write(f"==== {log.name}\n".encode() + log.read_bytes()[-_LOG_BYTES:] + b"\n")


def kept(path: Path, text: str) -> str:
    """Return the text that an earlier run wrote to the file, or write this one for later runs."""
    if not path.exists():
        path.write_text(text)
    return path.read_text()
