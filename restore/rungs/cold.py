# SPDX-License-Identifier: Apache-2.0
"""The cold rung: start the command without anything from the snapshot."""

import contextlib
import os

from rekindle.cell import Cell
from rekindle.report import Rung
from restore.decide.decision import Decision
from restore.rungs.ladder import TakenRung
from restore.rungs.run import Run
from restore.rungs.start import start_server
from restore.serve.address import Addresses


def take(
    run: Run, decision: Decision, addresses: Addresses, cell: Cell | None, stack: contextlib.ExitStack
) -> TakenRung:
    """Start the command in the environment of today."""
    command = decision.facts.command
    assert command
    return start_server(run, decision, addresses, cell, stack, Rung.COLD, command, os.environ)
