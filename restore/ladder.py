# SPDX-License-Identifier: Apache-2.0
"""The ladder: one rung after the other, each within its deadline, and undone before the next begins.

Only a mismatch and a failure to restore lead down. A signature that is missing or bad, a digest that does not
match and a record that is malformed end everything, on whatever rung they are met.
"""

import contextlib
import signal
import traceback
from collections.abc import Callable
from typing import Any, Self, TypeVar

from rekindle.errors import RekindleError
from rekindle.report import Reason, Report, Rung
from restore import match
from restore.plan import Plan, Step

T = TypeVar("T")

_CODES = {"restore": "restore-failed", "oracle": "oracle-mismatch"}


class DeadlinePassed(BaseException):
    """Raised in the main thread, wherever it is: no error, and not to be caught as one."""


class Deadline:
    """A context: raises DeadlinePassed in the main thread after some seconds, if it was neither left nor
    `off` by then; never, if that is None."""

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds
        self._before: Any = None

    def __enter__(self) -> Self:
        if self._seconds is not None:
            self._before = signal.signal(signal.SIGALRM, _over)
            signal.setitimer(signal.ITIMER_REAL, self._seconds)
        return self

    def __exit__(self, *_: object) -> None:
        self.off()

    def off(self) -> None:
        """There is no hurry any more. Idempotent."""
        if self._seconds is not None:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            signal.signal(signal.SIGALRM, self._before)
            self._seconds = None


def _over(signum: int, frame: object) -> None:  # noqa: ARG001
    raise DeadlinePassed


def climb(
    plan: Plan,
    take: Callable[[Step, contextlib.ExitStack, Deadline], T],
    report: Report,
    keep: contextlib.ExitStack,
    *,
    require: Rung = Rung.COLD,
) -> T:
    """Takes the highest rung that can be taken, and gives what `take` returns.

    `take` puts on `stack` what has to be undone if the rung fails; if it succeeds, that goes on to `keep`.
    The reasons of the rungs that were not taken are added to the report. Rungs below `require` are never
    tried: the error of the last one above them is raised then, as it is if the lowest fails.
    """
    rungs = list(Rung)
    lowest = rungs.index(require)
    for step in plan.steps:
        report.reasons += step.reasons
        last = step is plan.steps[-1] or rungs.index(step.rung) >= lowest
        try:
            match.require(step.reasons)
            with contextlib.ExitStack() as stack:
                with Deadline(step.deadline_seconds) as deadline:
                    taken = take(step, stack, deadline)
                keep.push(stack.pop_all().__exit__)
                return taken
        except DeadlinePassed:
            where = report.phases[-1].name
            code, message = "deadline", f"{where} was not done after {step.deadline_seconds:.0f} s"
            if last:
                from rekindle.errors import RestoreError

                raise RestoreError(f"the {step.rung} rung was given up: {message}") from None
        except RekindleError as error:
            if last or not error.descends:
                raise
            code = _CODES.get(error.code, error.code)
            message = error.message
            if step.possible:
                message += f" ({error.cause})" if error.cause else ""
        except Exception as error:
            if last:
                raise
            # A bug of ours costs the rung, not the service; it is not hidden either.
            traceback.print_exc()
            code, message = "bug", repr(error)
        if step.possible:
            report.reasons.append(_failure(step, code, message, report))
            report.say(f"{step.rung} failed: {message}")
        else:
            for reason in step.reasons:
                if reason.hard:
                    report.say(f"not by {step.rung}: {reason}")
    raise AssertionError("a plan has at least one step")


def _failure(step: Step, code: str, message: str, report: Report) -> Reason:
    return Reason(
        rung=step.rung,
        code=code,
        field=report.phases[-1].name,
        recorded="",
        here=message,
        hard=True,
        advice="read what was said on the standard error, or `rekindle doctor`",
    )
