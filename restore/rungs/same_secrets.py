# SPDX-License-Identifier: Apache-2.0
"""Compare the secrets of today with those that a restored process was started with.

No record holds a secret. But the process that started the server, the shell at the root of the tree, still
has its arguments and variables where the OS kernel put them.
"""

import os

from rekindle.cell import Cell, processes
from rekindle.engine.choose import from_record
from restore.decide import match_environment
from restore.decide.decision import Decision, strictness
from restore.decide.match_environment import RestoredStart
from restore.decide.plan import require_possible
from restore.decide.rules import reason_for
from restore.rungs.run import Run


def require_same_secrets(run: Run, decision: Decision, cell: Cell) -> None:
    """Report each secret that is another today. Raises MismatchError unless all of these are accepted."""
    record = decision.image.value.record
    engine = from_record(record.engine.name, record.endpoint, record.engine.options)
    found = match_environment.compare_restored(
        record,
        engine,
        os.environ,
        decision.facts.given or (),
        _restored_start(cell, record.process.root_pid),
    )
    rules = strictness(run.options)
    reasons = [rules.apply(reason_for(each)) for each in found]
    run.report.reasons += reasons
    require_possible(reasons)


def _restored_start(cell: Cell, root_pid: int) -> RestoredStart:
    place = processes.proc(cell) / str(root_pid)
    words = (place / "cmdline").read_bytes().split(b"\0")[:-1]
    variables = (place / "environ").read_bytes().split(b"\0")[:-1]
    pairs = (os.fsdecode(each).partition("=")[::2] for each in variables)
    return RestoredStart(argv=[os.fsdecode(word) for word in words], environment=dict(pairs))
