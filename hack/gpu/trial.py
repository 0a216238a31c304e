# SPDX-License-Identifier: Apache-2.0
"""One run of the acceptance test: its options, directories and results."""

from dataclasses import dataclass
from pathlib import Path

from hack.gpu.journal import Journal
from hack.gpu.starts import Lab


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialOptions:
    """The options of the command line. `python` is the interpreter of the server. `runs` is the number of
    restores that the main figure is taken from, `few` the number for other figures."""

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
    """The argument of every step."""

    options: TrialOptions
    lab: Lab
    journal: Journal
