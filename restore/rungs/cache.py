# SPDX-License-Identifier: Apache-2.0
"""The cache rung: start the command on the saved kernel cache, and prove that the cache was hit."""

import contextlib
from collections.abc import Sequence

from msgspec import structs

from rekindle.cell import Cell
from rekindle.engine.choose import with_recorded_sleep_mode
from rekindle.report import Rung
from restore.decide.decision import Decision, make_plan
from restore.decide.plan import Step, require_possible
from restore.rungs import place_cache
from restore.rungs.ladder import TakenRung
from restore.rungs.proof import WatchedCache
from restore.rungs.run import Run
from restore.rungs.start import start_server
from restore.serve.address import Addresses


def take(
    run: Run,
    decision: Decision,
    addresses: Addresses,
    cell: Cell | None,
    step: Step,
    stack: contextlib.ExitStack,
) -> TakenRung:
    """Put the kernel cache where the server looks for it, start the command, and observe what it uses."""
    source = decision.source
    assert source is not None
    with run.signals.raising(step.deadline_seconds):
        source.reconnect()
        step = with_inventory(run, decision, step)
    with run.signals.raising(step.deadline_seconds):
        environment, where = place_cache.place(run, decision, step, stack)
    with WatchedCache(source.roots(step), where) as watched:
        command = as_compiled(decision)
        return start_server(run, decision, addresses, cell, stack, Rung.CACHE, command, environment, watched)


def with_inventory(run: Run, decision: Decision, step: Step) -> Step:
    """Return the step, planned again with the kernel cache's inventory if the plan was made without it."""
    source, facts = decision.source, decision.facts
    if source is None or not facts.cache_unread:
        return step
    with run.report.phase("decide"):
        facts = structs.replace(facts, cache=source.read_kernels().value, cache_unread=False)
        step = next(each for each in make_plan(facts, run.options).steps if each.rung is Rung.CACHE)
    run.report.reasons += step.reasons
    require_possible(step.reasons)
    return step


def as_compiled(decision: Decision) -> Sequence[str]:
    """Return the command with the recorded options that are part of the cache's keys."""
    record, command = decision.image.value.record, decision.facts.command
    assert command
    here = decision.facts.node.devices.gpus
    if not any(gpu.vendor == "nvidia" for gpu in here):
        return command
    return with_recorded_sleep_mode(command, record.engine.options)
