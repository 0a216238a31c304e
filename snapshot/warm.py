# SPDX-License-Identifier: Apache-2.0
"""From a started server to one that is worth keeping: wait, warm, ask."""

import json
import os
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
_ANSWER_SECONDS = 300.0
_REQUESTS_LIMIT_BYTES = 16 << 20


def wait_ready(
    server: Server,
    engine: Engine,
    client: Client,
    timeout: float,
    meanwhile: Callable[[], None] = lambda: None,
) -> None:
    """Waits until the server takes requests, and calls `meanwhile` at every look.

    Raises WorkloadError as soon as it dies, NotReadyError when time is over; both with its last words.
    """
    deadline = time.monotonic() + timeout
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
                cause=server.last_words(),
                hint="give it more time with --ready-timeout, or look at its log for what it waits for",
                log=server.stderr,
            )


def warm(server: Server, engine: Engine, client: Client, batches: Sequence[Sequence[Request]]) -> int:
    """Sends batches of requests, each batch at once; returns how many were sent.

    A request that the server refuses (4xx) is no error: models differ in what they take.
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
                    server.cell.end()  # which breaks the connections that the pool would wait for
                    raise
        except OSError as error:
            server.raise_if_dead(1.0)
            raise WorkloadError(
                "the server broke off while it was warmed", cause=str(error), log=server.stderr
            ) from error
        for response in responses:
            if response.status >= 500:
                raise WorkloadError(
                    f"the server answered a warm-up request with status {response.status}",
                    cause=response.body[:500].decode(errors="replace"),
                    log=server.stderr,
                )
        sent += len(batch)
    return sent


def ask_twice(server: Server, engine: Engine, client: Client) -> Oracle:
    """Asks the oracle two times; raises OracleError if the answers differ."""
    try:
        request = engine.oracle_request(client)
        authorized = engine.authorize(request, os.environ)
        first, second = (engine.answer(client.ask(authorized, timeout=_ANSWER_SECONDS)) for _ in range(2))
    except OSError as error:
        server.raise_if_dead(1.0)
        raise WorkloadError(
            "the server broke off while the oracle was asked", cause=str(error), log=server.stderr
        ) from error
    if not engine.agree(first, second):
        raise OracleError(
            "the server answers the same question in two ways, so a restored one could not be proved",
            cause=f"first {json.dumps(first)[:300]}, then {json.dumps(second)[:300]}",
            hint="choose a question with one answer (greedy, fixed seed): --oracle-request FILE",
        )
    return Oracle(request=request, answer=first)


def read_requests(path: Path) -> list[list[Request]]:
    """Warm-up requests from a file, one JSON object a line, each a batch of its own. Raises UsageError."""
    try:
        if path.stat().st_size > _REQUESTS_LIMIT_BYTES:
            raise UsageError(f"{path} is larger than {_REQUESTS_LIMIT_BYTES} bytes")
        lines = [line for line in path.read_text().splitlines() if line.strip()]
        return [[Request.from_json(json.loads(line))] for line in lines]
    except (OSError, ValueError, FormatError) as error:
        raise UsageError(
            f"{path} holds no requests",
            cause=str(error),
            hint='write a line a request: {"method": "POST", "path": "/…", "body": {…}}',
        ) from error
