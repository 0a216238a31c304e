# SPDX-License-Identifier: Apache-2.0
"""Bring a started server to the state worth saving: wait until it is ready, warm it, ask its oracle."""

import json
import os
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rekindle.engine import Engine, Request
from rekindle.engine.client import Client
from rekindle.errors import FormatError, Interrupted, NotReadyError, OracleError, UsageError, WorkloadError
from rekindle.record import Oracle
from snapshot.server import Server

_POLL_SECONDS = 0.02
_FIRST_WORD_SECONDS = 10.0
_ANSWER_SECONDS = 300.0
_REQUESTS_LIMIT_BYTES = 16 << 20


def wait_ready(
    server: Server,
    engine: Engine,
    client: Client,
    timeout: float,
    *,
    meanwhile: Callable[[], None] = lambda: None,
    say: Callable[[str], None] = lambda _: None,
) -> None:
    """Wait until the server is ready, and call `meanwhile` before every poll.

    `say` is told now and then what the server answers instead. Raises WorkloadError as soon as it exits,
    NotReadyError after `timeout` seconds; both with the end of its log.
    """
    deadline = time.monotonic() + timeout
    say_at, pause = time.monotonic() + _FIRST_WORD_SECONDS, _FIRST_WORD_SECONDS
    while True:
        server.raise_if_dead(_POLL_SECONDS)
        meanwhile()
        try:
            if engine.ready(client, max(0.1, deadline - time.monotonic())):
                return
        except (OSError, NotReadyError):
            pass
        if time.monotonic() > deadline:
            raise NotReadyError(
                f"the server was not ready after {timeout:.0f} s",
                cause="\n".join(filter(None, (client.last_outcome, server.log_tail()))),
                hint=not_ready_hint(client.last_outcome),
                log=server.log,
            )
        if time.monotonic() > say_at:
            say(f"not ready yet: {client.last_outcome or 'it was not asked'}")
            pause *= 2
            say_at = time.monotonic() + pause


def not_ready_hint(outcome: str) -> str:
    """Return what to do about a server that answered like this to the last."""
    if re.search(r"status (?!503)[345]\d\d$", outcome):
        return "is this the URL that answers 2xx once the server is ready? See --ready-url"
    if "refused" in outcome:
        return "compare the address with the one in its log, or allow more time with --ready-timeout"
    if re.search(r"reset|BadStatusLine|RemoteDisconnected", outcome):
        return "does the server speak HTTPS there? It must answer rekindle by HTTP"
    return "allow more time with --ready-timeout, or look in its log for the reason"


def warm(server: Server, engine: Engine, client: Client, batches: Sequence[Sequence[Request]]) -> int:
    """Send batches of requests, those of a batch in parallel; return how many were sent.

    A status of 4xx is accepted, since models differ in the requests that they support. Raises
    WorkloadError for a status of 5xx or a broken connection.
    """
    sent = 0
    for batch in batches:
        authorized = [engine.authorize(request, os.environ) for request in batch]
        try:
            with ThreadPoolExecutor(len(authorized)) as pool:
                jobs = [pool.submit(client.ask, each, timeout=_ANSWER_SECONDS) for each in authorized]
                try:
                    responses = [job.result() for job in jobs]
                except (Interrupted, KeyboardInterrupt):
                    server.cell.end()  # breaks the connections that the pool would otherwise wait for
                    raise
        except OSError as error:
            server.raise_if_dead(1.0)
            raise WorkloadError(
                "the server closed a connection during warm-up", cause=str(error), log=server.log
            ) from error
        for response in responses:
            if response.status >= 500:
                raise WorkloadError(
                    f"the server answered a warm-up request with status {response.status}",
                    cause=response.body[:500].decode(errors="replace"),
                    log=server.log,
                )
        sent += len(batch)
    return sent


def known_oracle(server: Server, engine: Engine, client: Client) -> Oracle:
    """Return the engine's oracle, or ask the server twice."""
    known = engine.known_oracle()
    if known is not None:
        request, answer = known
        return Oracle(request=request, answer=answer)
    return ask_twice(server, engine, client)


def ask_twice(server: Server, engine: Engine, client: Client) -> Oracle:
    """Ask the oracle twice and return it. Raises OracleError if the answers differ."""
    try:
        request = engine.oracle_request(client)
        authorized = engine.authorize(request, os.environ)
        first, second = (engine.answer(client.ask(authorized, timeout=_ANSWER_SECONDS)) for _ in range(2))
    except OSError as error:
        server.raise_if_dead(1.0)
        raise WorkloadError(
            "the server did not answer the oracle's request", cause=str(error), log=server.log
        ) from error
    if not engine.agree(first, second):
        raise OracleError(
            "the server gave two answers to the same request, so a restore could not be checked",
            cause=f"first {json.dumps(first)[:300]}, then {json.dumps(second)[:300]}",
            hint="use a deterministic request (greedy, fixed seed): --oracle-request FILE",
        )
    return Oracle(request=request, answer=first)


def read_requests(path: Path) -> list[list[Request]]:
    """Read warm-up requests from a file, one JSON object per line, each its own batch. Raises UsageError."""
    try:
        if path.stat().st_size > _REQUESTS_LIMIT_BYTES:
            raise UsageError(f"{path} is larger than {_REQUESTS_LIMIT_BYTES} bytes")
        lines = [line for line in path.read_text().splitlines() if line.strip()]
        return [[Request.from_json(json.loads(line))] for line in lines]
    except (OSError, ValueError, FormatError) as error:
        raise UsageError(
            f"cannot read requests from {path}",
            cause=str(error),
            hint='write one request per line: {"method": "POST", "path": "/…", "body": {…}}',
        ) from error
