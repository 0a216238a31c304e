# SPDX-License-Identifier: Apache-2.0
"""The ladder: try one rung after the other, each within its deadline, and undo one before the next begins.

Only a mismatch or a failed restore leads to the next rung. A missing or bad signature, a digest that does
not match, and a malformed record end the restore on any rung.
"""

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from msgspec import Struct

from rekindle.errors import RekindleError, RestoreError
from rekindle.report import Report, Rung
from restore.decide.plan import Plan, Step, require_possible
from restore.decide.rules import failure_reason
from restore.signals import DeadlinePassed

if TYPE_CHECKING:
    from restore.serve.foreground import Serving

T = TypeVar("T")


def descend(
    plan: Plan,
    take: Callable[[Step, contextlib.ExitStack], T],
    report: Report,
    keep: contextlib.ExitStack,
    *,
    require: Rung = Rung.COLD,
) -> T:
    """Take the highest possible rung, and return what `take` returns for it.

    `take` pushes what undoes the rung onto its stack. If it raises, the stack is unwound; if it returns, the
    stack is moved to `keep`. The reasons of the rungs that were not taken are added to the report. Rungs
    below `require` are not tried. Raises the error of the last rung that was tried.
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
            phase = report.phases[-1].name if len(report.phases) > phases else step.rung
            why = failure_reason(step.rung, phase, error)
            if why.code == "bug":
                report.say_bug(error)
            if last or (isinstance(error, RekindleError) and not error.descends):
                if isinstance(error, DeadlinePassed):
                    raise RestoreError(f"the {step.rung} rung took too long", cause=why.here) from None
                raise
        against = [reason for reason in report.reasons[reasons:] if reason.hard]
        for reason in against:
            report.say(f"{step.rung} is not possible: {reason}")
        if not against:
            report.reasons.append(why)
            report.say(f"{step.rung} failed: {why.here}" + (f" ({why.advice})" if why.advice else ""))
    raise AssertionError("a plan has at least one step")


class TakenRung(Struct, frozen=True, kw_only=True):
    """A rung that was taken. `status` is set if its server exited before it was ready.

    `cell_init` is the PID of the init of its cell, if it has one. `require_memory` raises the error by which
    a server lost its memory, if it did.
    """

    rung: Rung
    serving: "Serving"
    status: int | None = None
    cell_init: int | None = None
    require_memory: Callable[[], None] = lambda: None
