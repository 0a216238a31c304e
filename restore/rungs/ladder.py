# SPDX-License-Identifier: Apache-2.0
"""The ladder: one rung after the other, each within its deadline, and undone before the next begins.

Only a mismatch and a failure to restore lead down. A signature that is missing or bad, a digest that does not
match and a record that is malformed end everything, on whatever rung they are met.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from rekindle.errors import RekindleError, RestoreError
from rekindle.report import Report, Rung
from restore.decide.plan import Plan, Step, require_possible
from restore.decide.rules import failure
from restore.serve.foreground import Serving
from restore.signals import DeadlinePassed

T = TypeVar("T")


def climb(
    plan: Plan,
    take: Callable[[Step, contextlib.ExitStack], T],
    report: Report,
    keep: contextlib.ExitStack,
    *,
    require: Rung = Rung.COLD,
) -> T:
    """Takes the highest rung that can be taken, and gives what `take` returns.

    `take` puts on its stack what has to be undone if the rung fails; if it succeeds, that goes on to `keep`.
    The reasons of the rungs that were not taken are added to the report. Rungs below `require` are never
    tried: the error of the last one above them is raised then, as it is if the lowest fails.
    """
    rungs = list(Rung)
    lowest = rungs.index(require)
    for step in plan.steps:
        phases, reasons = len(report.phases), len(report.reasons)
        report.reasons += step.reasons
        try:
            require_possible(step.reasons)
            with contextlib.ExitStack() as stack:
                taken = take(step, stack)
                keep.push(stack.pop_all().__exit__)
                return taken
        except (Exception, DeadlinePassed) as error:
            last = step is plan.steps[-1] or rungs.index(step.rung) >= lowest
            where = report.phases[-1].name if len(report.phases) > phases else step.rung
            why = failure(step.rung, where, error)
            if last or (isinstance(error, RekindleError) and not error.descends):
                if isinstance(error, DeadlinePassed):
                    raise RestoreError(f"the {step.rung} rung was given up", cause=why.here) from None
                raise
        against = [reason for reason in report.reasons[reasons:] if reason.hard]
        for reason in against:
            report.say(f"not by {step.rung}: {reason}")
        if not against:
            report.reasons.append(why)
            report.say(f"{step.rung} failed: {why.here}" + (f" ({why.advice})" if why.advice else ""))
    raise AssertionError("a plan has at least one step")


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """A rung that was taken. With a `status`, its server ended before it was ready."""

    rung: Rung
    serving: Serving
    status: int | None = None
