# SPDX-License-Identifier: Apache-2.0
"""The rules for a neutral process, besides those of processes: a part of restore/decide/rules.py."""

from collections.abc import Mapping

from rekindle.report import Rung
from restore.decide.rule import Rule

NEUTRAL_RULES: Mapping[str, Rule] = {
    "no-neutral": Rule(
        rung=Rung.NEUTRAL,
        hard=True,
        fixed=True,
        why="A neutral process can be made of a server that is a Python script, if its imports touch no "
        "hardware.",
        source="docs/adr/0040-neutral.md",
        advice="make the snapshot again: it says why there can be none",
    ),
    "neutral-command": Rule(
        rung=Rung.NEUTRAL,
        hard=True,
        fixed=True,
        why="It has imported the modules of one program, and can only become that one.",
        source="docs/adr/0040-neutral.md",
        advice="give the recorded program; its arguments may differ",
    ),
    "neutral-variable": Rule(
        rung=Rung.NEUTRAL,
        hard=True,
        why="Modules have read this variable while they were imported, or the libraries below them may have, "
        "and would find another value today.",
        source="observed: `os.environ` is watched while the modules are imported",
        advice="set the variable as it was at the snapshot, or take the snapshot in the environment of today",
    ),
}
