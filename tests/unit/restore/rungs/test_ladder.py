# SPDX-License-Identifier: Apache-2.0
"""The ladder with rungs that are made up: what is tried, what is undone before, and what ends it all."""

import contextlib
import os
import signal
from collections.abc import Callable
from typing import Any

import pytest

from cli._report import console
from rekindle import errors
from rekindle.errors import (
    CapabilityError,
    Interrupted,
    MismatchError,
    RekindleError,
    RestoreError,
    TrustError,
)
from rekindle.report import Report, Rung
from restore.decide.difference import Difference
from restore.decide.plan import Plan, Step
from restore.decide.rules import reason_for
from restore.rungs.ladder import descend
from restore.signals import DeadlinePassed

PROCESS, CACHE, COLD = Rung.PROCESS, Rung.CACHE, Rung.COLD
Act = Callable[[], object]
OLDER = reason_for(Difference("kernel-older", "kernel", "6.8", "5.15"))
NEWER = reason_for(Difference("kernel", "kernel", "6.8", "6.9"))
NO_CACHE = reason_for(Difference("no-cache", "kernel cache", "", "there is none"))
NO_COMMAND = reason_for(Difference("no-command", "command", "", "there is none"))


@pytest.fixture
def report() -> Report:
    return Report(verb="restore")


def steps(**changes: Any) -> Plan:
    """All three rungs; keywords are the reasons of one."""
    made = [Step(rung=rung, reasons=changes.get(rung.value, [])) for rung in (PROCESS, CACHE, COLD)]
    return Plan(asked=PROCESS, steps=made, device_map={})


class Rungs:
    """Takes rungs as it is told, and notes down what happens."""

    def __init__(self, report: Report, **acts: Act) -> None:
        self.report, self.acts = report, acts
        self.happened: list[str] = []

    def __call__(self, step: Step, stack: contextlib.ExitStack) -> str:
        self.happened.append(f"{step.rung} begins")
        stack.callback(self.happened.append, f"{step.rung} undone")
        stack.callback(self.happened.append, f"{step.rung} undone first")
        with self.report.phase(f"phase of {step.rung}"):
            if act := self.acts.get(step.rung):
                act()
        self.happened.append(f"{step.rung} taken")
        return f"a server by {step.rung}"


def fails(error: BaseException) -> Act:
    def act() -> None:
        raise error

    return act


def codes(report: Report) -> list[tuple[Rung, str]]:
    return [(reason.rung, reason.code) for reason in report.reasons]


def test_the_highest_rung_is_taken_and_what_it_holds_is_kept(report: Report) -> None:
    rungs = Rungs(report)
    with contextlib.ExitStack() as keep:
        assert descend(steps(process=[NEWER]), rungs, report, keep) == "a server by process"
        assert rungs.happened == ["process begins", "process taken"]
    assert rungs.happened[2:] == ["process undone first", "process undone"]
    assert codes(report) == [(PROCESS, "kernel")]


def test_a_rung_is_undone_before_the_next_begins(report: Report) -> None:
    acts = {"process": fails(RestoreError("it broke")), "cache": fails(RestoreError("this, too"))}
    rungs = Rungs(report, **acts)
    with contextlib.ExitStack() as keep:
        assert descend(steps(), rungs, report, keep) == "a server by cold"
        assert rungs.happened == [
            *("process begins", "process undone first", "process undone"),
            *("cache begins", "cache undone first", "cache undone"),
            *("cold begins", "cold taken"),
        ]
    assert codes(report) == [(PROCESS, "restore-failed"), (CACHE, "restore-failed")]


def test_undoing_learns_of_what_failed(report: Report) -> None:
    """As extraction does, which removes what it wrote only if the rung failed."""
    seen: list[object] = []

    def take(step: Step, stack: contextlib.ExitStack) -> Rung:
        stack.push(lambda kind, *_: seen.append(kind))
        if step.rung is PROCESS:
            raise RestoreError("it broke")
        return step.rung

    with contextlib.ExitStack() as keep:
        assert descend(steps(), take, report, keep) is CACHE
        assert seen == [RestoreError]
    assert seen == [RestoreError, None]


def test_a_rung_with_a_hard_reason_is_not_tried(report: Report, capsys: pytest.CaptureFixture[str]) -> None:
    report.tell = console(quiet=False)
    rungs = Rungs(report)
    with contextlib.ExitStack() as keep:
        descend(steps(process=[NEWER, OLDER], cache=[NO_CACHE]), rungs, report, keep)
    assert rungs.happened[0] == "cold begins"
    assert codes(report) == [(PROCESS, "kernel"), (PROCESS, "kernel-older"), (CACHE, "no-cache")]
    told = capsys.readouterr().err
    assert "process is not possible: kernel-older: kernel was 6.8, is 5.15" in told
    assert "cache is not possible: no-cache: there is none" in told
    assert "6.9" not in told


def test_reasons_of_rungs_below_are_not_told(report: Report) -> None:
    with contextlib.ExitStack() as keep:
        descend(steps(cache=[NO_CACHE]), Rungs(report), report, keep)
    assert report.reasons == []


def test_a_failure_is_told_with_the_phase_in_which_it_came(report: Report) -> None:
    error = RestoreError("CRIU could not restore the server", cause="Error (x.c:1): no")
    with contextlib.ExitStack() as keep:
        descend(steps(), Rungs(report, process=fails(error)), report, keep)
    (reason,) = report.reasons
    assert (reason.rung, reason.code, reason.hard) == (PROCESS, "restore-failed", True)
    assert reason.field == "phase of process"
    assert reason.here == "CRIU could not restore the server (Error (x.c:1): no)"


ERRORS = [
    each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, RekindleError)
]


@pytest.mark.parametrize(
    "kind", [each for each in ERRORS if each is not RekindleError], ids=lambda kind: kind.__name__
)
def test_an_error_leads_down_or_ends_everything(report: Report, kind: type[RekindleError]) -> None:
    rungs = Rungs(report, process=fails(kind("this is wrong")))
    with contextlib.ExitStack() as keep:
        if kind.descends:
            assert descend(steps(), rungs, report, keep) == "a server by cache"
            wanted = {"restore": "restore-failed", "oracle": "oracle-mismatch"}.get(kind.code, kind.code)
            assert codes(report) == [(PROCESS, wanted)]
        else:
            with pytest.raises(kind):
                descend(steps(), rungs, report, keep)
            assert rungs.happened[-1] == "process undone"
            assert not any(line.startswith("c") for line in rungs.happened)


@pytest.mark.parametrize("rung", [PROCESS, CACHE])
@pytest.mark.parametrize("kind", [errors.TrustError, errors.IntegrityError, errors.FormatError])
def test_what_is_not_to_be_trusted_is_never_followed_by_another_start(
    report: Report, rung: Rung, kind: type[RekindleError]
) -> None:
    acts = {"process": fails(RestoreError("it broke")), rung.value: fails(kind("no"))}
    rungs = Rungs(report, **acts)
    with contextlib.ExitStack() as keep, pytest.raises(kind):
        descend(steps(), rungs, report, keep)
    assert rungs.happened[-1] == f"{rung} undone"
    assert "cold begins" not in rungs.happened


def test_the_error_of_the_last_rung_is_that_of_the_command(report: Report) -> None:
    acts = {rung.value: fails(RestoreError(f"{rung} broke")) for rung in Rung}
    rungs = Rungs(report, **acts)
    with contextlib.ExitStack() as keep, pytest.raises(RestoreError, match="cold broke"):
        descend(steps(), rungs, report, keep)
    assert rungs.happened[-1] == "cold undone"


def test_without_a_rung_that_is_possible_the_last_says_why(report: Report) -> None:
    with contextlib.ExitStack() as keep, pytest.raises(MismatchError) as caught:
        descend(steps(process=[OLDER], cache=[NO_CACHE], cold=[NO_COMMAND]), Rungs(report), report, keep)
    assert "no-command" in caught.value.cause
    assert len(report.reasons) == 3


@pytest.mark.parametrize(
    ("required", "tried"),
    [(PROCESS, ["process"]), (CACHE, ["process", "cache"]), (COLD, ["process", "cache", "cold"])],
)
def test_rungs_below_the_required_one_are_never_tried(
    report: Report, required: Rung, tried: list[str]
) -> None:
    acts = {rung.value: fails(RestoreError(f"{rung} broke")) for rung in Rung}
    rungs = Rungs(report, **acts)
    with contextlib.ExitStack() as keep, pytest.raises(RestoreError, match=f"{required} broke"):
        descend(steps(), rungs, report, keep, require=required)
    assert [line.split()[0] for line in rungs.happened if line.endswith("begins")] == tried


def test_a_required_rung_that_is_not_possible_ends_it(report: Report) -> None:
    lacking = [reason_for(Difference("criu", "criu", "", "there is none"))]
    rungs = Rungs(report)
    with contextlib.ExitStack() as keep, pytest.raises(CapabilityError, match="cannot restore"):
        descend(steps(process=lacking), rungs, report, keep, require=PROCESS)
    assert rungs.happened == []
    assert codes(report) == [(PROCESS, "criu")]


# A bug costs the rung, and no more.


def test_a_bug_costs_the_rung_and_is_not_hidden(report: Report) -> None:
    said: list[str] = []
    report.tell = said.append
    rungs = Rungs(report, process=fails(ValueError("never thought of that")))
    with contextlib.ExitStack() as keep:
        assert descend(steps(), rungs, report, keep) == "a server by cache"
    assert rungs.happened[:3] == ["process begins", "process undone first", "process undone"]
    (reason,) = report.reasons
    assert (reason.code, reason.here) == ("bug", "ValueError('never thought of that')")
    told = "\n".join(said)
    assert "Traceback" in told
    assert "never thought of that" in told


def test_a_bug_of_the_last_rung_is_one_of_the_command(report: Report) -> None:
    rungs = Rungs(report, cold=fails(ValueError("never thought of that")))
    plan = steps(process=[OLDER], cache=[NO_CACHE])
    with contextlib.ExitStack() as keep, pytest.raises(ValueError, match="never"):
        descend(plan, rungs, report, keep)


def test_undoing_that_fails_costs_no_more(report: Report) -> None:
    def take(step: Step, stack: contextlib.ExitStack) -> Rung:
        if step.rung is PROCESS:
            stack.callback(lambda: os.rmdir("/nowhere"))
            raise RestoreError("it broke")
        return step.rung

    with contextlib.ExitStack() as keep:
        assert descend(steps(), take, report, keep) is CACHE
    assert codes(report) == [(PROCESS, "bug")]


# Signals, and time.


@pytest.mark.parametrize("error", [Interrupted(signal.SIGTERM), KeyboardInterrupt(), SystemExit(3)])
def test_who_is_asked_to_end_ends(report: Report, error: BaseException) -> None:
    rungs = Rungs(report, process=fails(error))
    with contextlib.ExitStack() as keep, pytest.raises(type(error)):
        descend(steps(), rungs, report, keep)
    assert rungs.happened == ["process begins", "process undone first", "process undone"]


def test_a_rung_that_takes_too_long_is_undone(report: Report) -> None:
    rungs = Rungs(report, process=fails(DeadlinePassed(15.0)))
    with contextlib.ExitStack() as keep:
        assert descend(steps(), rungs, report, keep) == "a server by cache"
    assert rungs.happened[:4] == [
        *("process begins", "process undone first", "process undone", "cache begins"),
    ]
    (reason,) = report.reasons
    assert (reason.rung, reason.code, reason.field) == (PROCESS, "deadline", "phase of process")
    assert reason.here == "phase of process was not done after 15.0 s"
    assert "--process-deadline" in reason.advice


def test_the_last_rung_that_takes_too_long_is_an_error(report: Report) -> None:
    rungs = Rungs(report, process=fails(DeadlinePassed(15.0)))
    with contextlib.ExitStack() as keep, pytest.raises(RestoreError, match="process rung took too long"):
        descend(steps(), rungs, report, keep, require=PROCESS)
    assert rungs.happened[-1] == "process undone"


def test_what_a_rung_found_out_about_itself_is_no_failure(report: Report) -> None:
    """As the kernel cache, of which the plan may know no more than that there is one."""

    def looks() -> None:
        report.reasons.append(NO_CACHE)
        raise MismatchError("this node cannot use the snapshot's kernel cache")

    with contextlib.ExitStack() as keep:
        descend(steps(process=[OLDER]), Rungs(report, cache=looks), report, keep)
    assert codes(report) == [(PROCESS, "kernel-older"), (CACHE, "no-cache")]


def test_a_signature_that_is_bad_is_no_bug(report: Report, capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.ExitStack() as keep, pytest.raises(TrustError):
        descend(steps(), Rungs(report, process=fails(TrustError("signed by nobody"))), report, keep)
    assert "Traceback" not in capsys.readouterr().err
