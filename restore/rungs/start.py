# SPDX-License-Identifier: Apache-2.0
"""Start a command and wait until its server is ready, for the cache rung and the cold one."""

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import Struct

from rekindle.cell import Cell
from rekindle.engine import Engine
from rekindle.environment import KEY_VARIABLES
from rekindle.errors import Interrupted, WorkloadError
from rekindle.record import Oracle
from rekindle.report import OracleAnswer, Report, Rung
from restore.decide.decision import Decision, begin_reading
from restore.options import Output
from restore.rungs.child import ChildServer
from restore.rungs.ladder import TakenRung
from restore.rungs.listening import is_held_by_our_server
from restore.rungs.readiness import ReadinessWait, Ready
from restore.rungs.run import Run
from restore.serve.address import Addresses, bind
from restore.serve.foreground import Replica, Serving
from restore.signals import Signals

if TYPE_CHECKING:
    from restore.rungs.proof import WatchedCache


_OURS = {"NOTIFY_SOCKET", *KEY_VARIABLES}
"""Variables that are for rekindle, and not for a server."""


Launch = Callable[[Sequence[str], Mapping[str, str], Path], Replica]
"""Makes a server of a command, an environment and a directory."""


class StartedServer(Struct, frozen=True, kw_only=True):
    """A started server: ready, or with a `status`, exited before it was.

    `ready` is None if no engine can tell when the server is ready.
    """

    serving: Serving
    first_output: Callable[[], str]
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
    say: Callable[[str], None],
    listen: bool,
    launch: Launch | None = None,
) -> StartedServer:
    """Start the command and wait until it is ready or exits. What ends the server is pushed onto `stack`.

    `launch` starts it in another way.

    From now on, signals go to the server and do not raise. Raises Interrupted, after the server has exited,
    if a signal asked it to end before it was ready; UsageError if the command cannot be started.
    """
    server: Replica
    first_output: Callable[[], str] = str
    if launch is not None:
        server = launch(command, environment, directory)
    else:
        server = child = stack.enter_context(
            ChildServer(
                command,
                environment=environment,
                directory=directory,
                stdout=output.stdout,
                stderr=output.stderr,
                listen=listen,
            )
        )
        first_output = lambda: child.first_output  # noqa: E731
    serving = stack.enter_context(Serving(server, signals, asked_to_end))
    if engine is None:
        return StartedServer(serving=serving, first_output=first_output, ready=None, status=None)
    with ReadinessWait(engine, oracle, is_ours=is_held_by_our_server, say=say) as waiting:
        serving.watch(waiting.fileno(), lambda: None)
        status = serving.run(until=lambda: waiting.result is not None)
        serving.forget(waiting.fileno())
    if status is not None and serving.signalled is not None:
        raise Interrupted(serving.signalled)
    return StartedServer(serving=serving, first_output=first_output, ready=waiting.result, status=status)


def start_server(
    run: Run,
    decision: Decision,
    addresses: Addresses,
    cell: Cell | None,
    stack: contextlib.ExitStack,
    rung: Rung,
    command: Sequence[str],
    environment: Mapping[str, str],
    watched: "WatchedCache | None" = None,
    launch: Launch | None = None,
) -> TakenRung:
    """Start a command and wait until it is ready.

    `watched` observes what the server uses of a kernel cache. Raises WorkloadError if the server exits
    before it is ready on the cache rung; on the cold rung the result has its status, since no rung is left.
    """
    report, image, engine = run.report, decision.facts.image, decision.engine
    if decision.source is not None:
        decision.source.close()
    if cell is not None:
        cell.end()
    report.oracle, report.first_token_seconds = None, None  # those of a failed process rung
    listens = engine.endpoint if engine else None
    for target in addresses.release_own(listens):
        bind(target).close()  # if this raises, another server is there and could be mistaken for ours
    known = image and engine and image.record.engine.name == engine.name
    oracle = image.record.oracle if image and known else None
    run.signals.check()
    if image is not None:
        begin_reading(run.read_ahead, image.record, run.options)
    with report.phase("server"):
        up = bring_up(
            stack,
            command,
            environment={name: value for name, value in environment.items() if name not in _OURS},
            directory=_directory(decision),
            output=run.options.output,
            engine=engine,
            oracle=oracle,
            signals=run.signals,
            asked_to_end=run.announcer.asked_to_end,
            say=report.say,
            listen=watched is not None,
            launch=launch,
        )
    report.read_ahead = run.read_ahead.use
    run.read_ahead.stop()
    if up.status is not None:
        error = WorkloadError(f"the server exited with status {up.status} before it was ready")
        if rung is not Rung.COLD:
            raise error
        report.fail(error)
        return TakenRung(rung=rung, serving=up.serving, status=up.status)
    if up.ready is None:
        report.say("cannot tell when this server is ready: add --ready-url URL")
    elif oracle is not None and engine is not None:
        _report_answer(report, up.ready, oracle, engine)
    if watched is not None and engine is not None:
        report.cache = watched.proof(engine.compiled(up.first_output())).summary
    up.serving.client_address = run.options.client_address
    for sock, target in addresses.listen(listens):
        up.serving.publish(sock, target)
    return TakenRung(rung=rung, serving=up.serving)


def _directory(decision: Decision) -> Path:
    """Return the command's working directory: the recorded one, if the command is, and it exists here."""
    image = decision.facts.image
    recorded = image.record.directory if image and not decision.facts.given else ""
    return Path(recorded) if recorded and os.access(f"{recorded}/.", os.X_OK) else Path.cwd()


def _report_answer(report: Report, ready: Ready, oracle: Oracle, engine: Engine) -> None:
    """Report the oracle's answer. On a lower rung it decides nothing."""
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
        problem=ready.problem,
    )
