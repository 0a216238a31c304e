# SPDX-License-Identifier: Apache-2.0
"""A server that is brought up as its command says, until it answers: the cache rung and the cold one."""

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rekindle.cell import Cell
from rekindle.engine import Engine
from rekindle.errors import Interrupted, WorkloadError
from rekindle.record import Oracle
from rekindle.report import OracleAnswer, Report, Rung
from restore.decide.decision import Decision
from restore.options import Output
from restore.rungs.child import Started
from restore.rungs.ladder import Taken
from restore.rungs.readiness import Ready, Waiting
from restore.rungs.run import Run
from restore.serve.address import Address, bind
from restore.serve.foreground import Serving
from restore.signals import Signals

if TYPE_CHECKING:
    from restore.rungs.proof import Watched


@dataclass(frozen=True, slots=True, kw_only=True)
class Up:
    """A server that answers, or, with a `status`, one that has ended before it did. `ready` is None if nobody
    can tell when it is."""

    serving: Serving
    started: Started
    ready: Ready | None
    status: int | None


def bring_up(
    stack: contextlib.ExitStack,
    command: Sequence[str],
    *,
    environment: Mapping[str, str],
    directory: Path,
    output: Output,
    engine: Engine | None,
    oracle: Oracle | None,
    signals: Signals,
    asked_to_end: Callable[[int], None],
    listen: bool,
) -> Up:
    """Starts the command and waits. What ends the server again is put on the stack.

    Signals are passed on to the server from now on; nothing may raise them. Raises Interrupted, once the
    server has ended, if it was asked to end before it was ready; UsageError if there is no such command.
    """
    started = stack.enter_context(
        Started(
            command,
            environment=environment,
            directory=directory,
            stdout=output.stdout,
            stderr=output.stderr,
            listen=listen,
        )
    )
    endpoint = engine.endpoint if engine else None
    serving = stack.enter_context(Serving(started, endpoint, signals, asked_to_end))
    if engine is None:
        return Up(serving=serving, started=started, ready=None, status=None)
    with Waiting(engine, oracle) as waiting:
        serving.watch(waiting.fileno(), lambda: None)
        status = serving.run(until=lambda: waiting.result is not None)
        serving.forget(waiting.fileno())
    if status is not None and serving.signalled is not None:
        raise Interrupted(serving.signalled)
    return Up(serving=serving, started=started, ready=waiting.result, status=status)


def start(
    run: Run,
    decision: Decision,
    address: Address,
    cell: Cell | None,
    stack: contextlib.ExitStack,
    rung: Rung,
    command: Sequence[str],
    environment: Mapping[str, str],
    watched: "Watched | None" = None,
) -> Taken:
    """Start a command, and wait until it answers.

    `watched` sees what the server uses of a kernel cache. Raises WorkloadError if the server ends before it
    is ready on the cache rung; on the cold one its status is the result, as it would be without us.
    """
    report, image, engine = run.report, decision.facts.image, decision.engine
    if decision.source is not None:
        decision.source.close()
    if cell is not None:
        cell.end()
    report.oracle, report.first_token_seconds = None, None  # of a process that was given up
    listens = engine.endpoint if engine else None
    forwarded = address.is_forwarded(listens)
    if not forwarded:
        address.release()  # the server takes it itself
    elif listens is not None:
        bind(listens).close()  # or another server would be taken for ours
    known = image and engine and image.record.engine == engine.name
    oracle = image.record.oracle if image and known else None
    run.signals.check()
    with report.phase("server"):
        up = bring_up(
            stack,
            command,
            environment={name: value for name, value in environment.items() if name != "NOTIFY_SOCKET"},
            directory=_directory(decision),
            output=run.options.output,
            engine=engine,
            oracle=oracle,
            signals=run.signals,
            asked_to_end=run.announcer.asked_to_end,
            listen=watched is not None,
        )
    if up.status is not None:
        lost = WorkloadError(f"the server ended with status {up.status} before it was ready")
        if rung is Rung.CACHE:
            raise lost
        report.error = lost.to_json()
        return Taken(rung=rung, serving=up.serving, status=up.status)
    if up.ready is None:
        report.say("nothing tells when this server is ready: add --ready-url URL")
    elif oracle is not None and engine is not None:
        _tell_answer(report, up.ready, oracle, engine)
    if watched is not None and engine is not None:
        report.cache = watched.proof(engine.compiled(up.started.log)).to_json()
    if forwarded and (sock := address.listen()) is not None:
        up.serving.publish(sock)
    return Taken(rung=rung, serving=up.serving)


def _directory(decision: Decision) -> Path:
    """Return where the command is started: the recorded command where it was recorded, if that is here."""
    image = decision.facts.image
    recorded = image.record.directory if image and not decision.facts.given else ""
    return Path(recorded) if recorded and os.access(f"{recorded}/.", os.X_OK) else Path.cwd()


def _tell_answer(report: Report, ready: Ready, oracle: Oracle, engine: Engine) -> None:
    """Report what the oracle answered, which decides nothing on a lower rung."""
    report.split_phase("oracle", at=ready.at)
    first = None
    if ready.first_byte is not None:
        report.first_token_seconds = ready.first_byte - report.began
        first = ready.first_byte - ready.at
    report.oracle = OracleAnswer(
        expected=oracle.answer,
        got=ready.answer,
        match=ready.answer is not None and engine.agree(oracle.answer, ready.answer),
        first_token_seconds=first,
        problem=ready.lack,
    )
