# SPDX-License-Identifier: Apache-2.0
"""Wait in a thread until a started server is ready, then ask it the oracle once."""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Self

from msgspec import Struct

from rekindle.engine import Endpoint, Engine
from rekindle.errors import RekindleError
from rekindle.fields import JSON

if TYPE_CHECKING:
    from rekindle.engine.client import Client
    from rekindle.record import Oracle

_POLL_SECONDS = 0.05
_ASK_SECONDS = 5.0
_ORACLE_SECONDS = 120.0


class Ready(Struct, frozen=True, kw_only=True):
    """When the server was ready, and the oracle's answer.

    `at` and `first_byte`, the start of the answer, are times of time.monotonic; `first_byte` is None
    without an answer. `problem` says why there is none; empty if the oracle was not asked or answered.
    """

    at: float
    first_byte: float | None = None
    answer: JSON = None
    problem: str = ""


class ReadinessWait:
    """The waiting thread, as a context. `fileno` is readable once there is a `result`."""

    def __init__(
        self,
        engine: Engine,
        oracle: "Oracle | None",
        *,
        is_ours: Callable[[Endpoint], bool],
        say: Callable[[str], None],
    ) -> None:
        """Prepare to wait. `is_ours` tells whether our server is the one that listens at its address."""
        self.result: Ready | None = None
        self._is_ours = is_ours
        self._say = say
        self._engine = engine
        self._oracle = oracle
        self._over = threading.Event()
        self._reader, self._writer = os.pipe()
        self._thread = threading.Thread(target=self._wait, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join(0.1)  # no longer: it may be in the middle of a request
        if not self._thread.is_alive():
            os.close(self._writer)
            os.close(self._reader)

    def fileno(self) -> int:
        return self._reader

    def _wait(self) -> None:
        from rekindle.engine.client import Client

        client = Client(self._engine.endpoint, _connect)
        has_said = False
        while not self._over.is_set():
            with contextlib.suppress(Exception):  # whatever the error is, the server is not ready
                if self._engine.ready(client, _ASK_SECONDS):
                    if not self._is_ours(self._engine.endpoint):
                        if not has_said:
                            self._say(f"another server answers at {self._engine.endpoint}; waiting for ours")
                        has_said = True
                        self._over.wait(_POLL_SECONDS)
                        continue
                    self.result = self._ask(client, time.monotonic())
                    with contextlib.suppress(OSError):
                        os.write(self._writer, b"\n")
                    return
            self._over.wait(_POLL_SECONDS)

    def _ask(self, client: "Client", at: float) -> Ready:
        if self._oracle is None:
            return Ready(at=at)
        try:
            request = self._engine.authorize(self._oracle.request, os.environ)
            response = client.ask(request, timeout=_ORACLE_SECONDS)
            return Ready(at=at, first_byte=response.first_byte, answer=self._engine.answer(response))
        except RekindleError as error:  # for example another model name or answer format: only reported
            return Ready(at=at, problem=error.message)
        except Exception as error:
            return Ready(at=at, problem=repr(error))


def _connect(host: str, port: int, timeout: float) -> socket.socket:
    return socket.create_connection((host, port), timeout)
