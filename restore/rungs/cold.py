# SPDX-License-Identifier: Apache-2.0
"""The cold rung: start the command without anything from the snapshot."""

import contextlib
import os
from collections.abc import Mapping

from rekindle.cell import Cell
from rekindle.report import Rung
from restore.decide.decision import Decision
from restore.rungs import place_cache
from restore.rungs.ladder import TakenRung
from restore.rungs.run import Run
from restore.rungs.start import start_server
from restore.serve.address import Address


def take(
    run: Run, decision: Decision, address: Address, cell: Cell | None, stack: contextlib.ExitStack
) -> TakenRung:
    """Start the command. A recorded command also gets the recorded variables that are not set here."""
    facts = decision.facts
    environment: Mapping[str, str] = os.environ
    if facts.image is not None and not facts.given:
        environment = place_cache.environment(facts.image.record, os.environ)
    assert facts.command
    return start_server(run, decision, address, cell, stack, Rung.COLD, facts.command, environment)
