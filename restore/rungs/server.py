# SPDX-License-Identifier: Apache-2.0
"""A server that is brought up as its command says, until it answers: the cache rung and the cold one."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rekindle.engine import Engine
from rekindle.errors import Interrupted
from rekindle.record import Oracle
from restore.options import Output
from restore.rungs.child import Started
from restore.rungs.readiness import Ready, Waiting
from restore.serve.foreground import Serving
from restore.signals import Signals


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
