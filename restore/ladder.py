# SPDX-License-Identifier: Apache-2.0
"""The ladder: one rung after the other, each within its deadline, and undone before the next begins.

Only a mismatch and a failure to restore lead down. A signature that is missing or bad, a digest that does not
match and a record that is malformed end everything, on whatever rung they are met.
"""

import contextlib
import traceback
from collections.abc import Callable
from typing import TypeVar

from rekindle.errors import RekindleError, RestoreError
from rekindle.report import Reason, Report, Rung
from restore import match
from restore.plan import Plan, Step
from restore.signals import DeadlinePassed

T = TypeVar("T")

_CODES = {"restore": "restore-failed", "oracle": "oracle-mismatch"}


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
            match.require(step.reasons)
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


def failure(rung: Rung, where: str, error: BaseException) -> Reason:
    """The reason that a try which failed leaves. A bug of ours costs the rung, not the service; it is not
    hidden, either."""
    advice = f"--{rung}-deadline S allows more"
    match error:
        case DeadlinePassed():
            code, told = "deadline", f"{where} was not done after {error.seconds:.1f} s"
        case RekindleError():
            code = _CODES.get(error.code, error.code)
            told = f"{error.message} ({error.cause})" if error.cause else error.message
            advice = f"see {error.log}" if error.log else error.hint
        case _:
            traceback.print_exception(error)
            code, told, advice = "bug", repr(error), "report it, with what stands on the standard error"
    return Reason(rung=rung, code=code, field=where, recorded="", here=told, hard=True, advice=advice)
