# SPDX-License-Identifier: Apache-2.0
"""Compare the secrets of today with those that a restored process was started with.

No record holds a secret. But the process that started the server, the shell at the root of the tree, still
has its arguments and variables where the OS kernel put them.
"""

import os

from rekindle.cell import Cell, processes
from rekindle.engine.choose import from_record
from rekindle.environment import file_key
from rekindle.proc import at_random
from restore.decide import match_environment, match_loaded
from restore.decide.decision import Decision, strictness
from restore.decide.match_environment import RestoredStart
from restore.decide.plan import require_possible
from restore.decide.rules import reason_for
from restore.rungs.run import Run


def require_same_secrets(run: Run, decision: Decision, cell: Cell) -> None:
    """Report each secret that is another today: a variable's, an option's, a file's.

    Raises MismatchError unless all of these are accepted.
    """
    record = decision.image.value.record
    engine = from_record(record.engine.name, record.endpoint, record.engine.options)
    given = decision.facts.given or ()
    start = _restored_start(cell, record.process.root_pid)
    found = match_environment.compare_restored(record, engine, os.environ, given, start)
    place = processes.proc(cell) / str(record.process.root_pid)
    key = file_key(start.environment) or at_random(place)
    found += match_loaded.compare_secret_files(record, given, os.environ, key)
    rules = strictness(run.options)
    reasons = [rules.apply(reason_for(each)) for each in found]
    run.report.reasons += reasons
    require_possible(reasons)


def _restored_start(cell: Cell, root_pid: int) -> RestoredStart:
    place = processes.proc(cell) / str(root_pid)
    words = (place / "cmdline").read_bytes().split(b"\0")[:-1]
    variables = processes.environment(cell, root_pid)
    return RestoredStart(argv=[os.fsdecode(word) for word in words], environment=variables)
