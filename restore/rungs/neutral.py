# SPDX-License-Identifier: Apache-2.0
"""The neutral rung: restore a process that has imported what the server does, and let it be the command."""

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from msgspec import structs

from rekindle.cell import Cell, neutral, processes
from rekindle.errors import MismatchError
from rekindle.files import copy_sparse_tree
from rekindle.os_errors import naming_full_disk
from rekindle.report import Rung
from restore import dumps
from restore.decide.decision import Decision, make_plan
from restore.decide.facts import neutral_facts
from restore.decide.match_neutral import becomes
from restore.decide.plan import Step, require_possible
from restore.rungs import place_cache
from restore.rungs.cache import as_compiled, with_inventory
from restore.rungs.ladder import TakenRung
from restore.rungs.process import call_criu
from restore.rungs.proof import WatchedCache
from restore.rungs.run import Run
from restore.rungs.start import start_server
from restore.serve.address import Addresses
from restore.serve.foreground import Replica, RestoredServer


def take(
    run: Run,
    decision: Decision,
    addresses: Addresses,
    cell: Cell | None,
    step: Step,
    stack: contextlib.ExitStack,
) -> TakenRung:
    """Restore the neutral process into a cell on this host's network, and let it become the command.

    The kernel cache is put where the server looks for it, if the image has one that is of use here.
    """
    source, home, report = decision.source, decision.home, run.report
    assert source is not None
    assert home is not None
    with run.signals.raising(step.deadline_seconds):
        source.reconnect()
        step = _with_record(run, decision, step)
        tool = decision.facts.abilities.criu
        assert tool is not None
        if cell is not None:
            cell.end()
        own = stack.enter_context(Cell())
        environment, watch = _place_cache(run, decision, stack)
        verified = source.read_neutral()
        record = verified.value.record
        work = stack.enter_context(home.work("restore"))
        with run.listener.progress(source.tally):
            expect = source.tally.expect if source.tally else None
            dump = stack.enter_context(dumps.ready(home, work, verified, report, expect=expect))
        stack.callback(own.end)  # before the dump is unlocked
        with report.phase("cell"):
            own.enter(record.process.network, record.process.clocks)
            with naming_full_disk("the cell's /dev/shm", hint="the node is out of memory"):
                copy_sparse_tree(dump / "shm", own.root / "dev/shm")
        used = call_criu(
            own, record, dump, tool, home, work, run.options.output, report, run.options.memory, None
        )

    def launch(argv: Sequence[str], variables: Mapping[str, str], directory: Path) -> Replica:
        program = becomes(record, argv, variables)
        assert program is not None
        where = directory / program.directory
        neutral.send(
            own.root,
            [_called(program.argv, program.environment), *program.argv[1:]],
            program.environment,
            where,
        )
        return RestoredServer(
            own, record.process, None, (run.options.output.stdout, run.options.output.stderr)
        )

    command = as_compiled(decision)
    with watch as watched:
        taken = start_server(
            run, decision, addresses, None, stack, Rung.NEUTRAL, command, environment, watched, launch
        )
    own_bytes, file_bytes = processes.memory_bytes(own)
    report.memory = structs.replace(used, own_bytes=own_bytes, file_bytes=file_bytes)
    return structs.replace(taken, cell_init=own.init_pid)


def _called(argv: Sequence[str], environment: Mapping[str, str]) -> str:
    """Return what a start would call the program: its path, as the OS kernel hands it to the interpreter."""
    from rekindle.node import packages

    return str(packages.program(argv, environment))


def _with_record(run: Run, decision: Decision, step: Step) -> Step:
    """Return the step, planned again with the record of the neutral process if it was not read before."""
    source, facts = decision.source, decision.facts
    if source is None or not facts.neutral_unread:
        return step
    assert decision.home is not None
    with run.report.phase("decide"):
        neutral_process = source.read_neutral()
        found = neutral_facts(neutral_process, decision.home, facts.given or (), is_local=facts.local)
        facts = structs.replace(facts, neutral=found, neutral_unread=False)
        step = next(each for each in make_plan(facts, run.options).steps if each.rung is Rung.NEUTRAL)
    run.report.reasons += step.reasons
    require_possible(step.reasons)
    return step


def _place_cache(
    run: Run, decision: Decision, stack: contextlib.ExitStack
) -> tuple[Mapping[str, str], contextlib.AbstractContextManager[WatchedCache | None]]:
    """Put the kernel cache in its place if there is one; return the environment, and a watch of the cache."""
    step = next((each for each in decision.plan.steps if each.rung is Rung.CACHE and each.possible), None)
    if step is None or decision.image.value.cache is None:
        return os.environ, contextlib.nullcontext()
    assert decision.source is not None
    try:
        step = with_inventory(run, decision, step)
    except MismatchError:  # its reasons are in the report; the imports are worth having without it
        return os.environ, contextlib.nullcontext()
    environment, where = place_cache.place(run, decision, step, stack)
    return environment, WatchedCache(decision.source.roots(step), where)
