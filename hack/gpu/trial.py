# SPDX-License-Identifier: Apache-2.0
"""One run of the acceptance: what was asked for, where everything lies, and what is known so far."""

from dataclasses import dataclass
from pathlib import Path

from hack.gpu.journal import Journal
from hack.gpu.starts import Lab


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What was asked for on the command line. `python` is the server's; `few` is the number of runs for all
    but the main figure."""

    python: str
    gib: float
    runs: int
    few: int
    cold_runs: int
    quick: bool
    stand_in: bool
    vllm_model: Path | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What is handed to every step."""

    options: Options
    lab: Lab
    journal: Journal
