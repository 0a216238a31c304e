# SPDX-License-Identifier: Apache-2.0
"""Engines: what rekindle knows of a kind of server.

An engine says where the server listens, when it is ready, which requests warm it, which question proves
it (the oracle) and what of the answer counts. It only talks HTTP; it starts and stops nothing.

    vllm    recognised from the command: `vllm serve …`, `python -m vllm.entrypoints.openai.api_server …`
    http    any other server: a URL that answers when it is ready, and a file with the oracle's request
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from rekindle.engine.address import Endpoint, Request, parse_endpoint
from rekindle.fields import JSON

if TYPE_CHECKING:
    from rekindle.engine.client import Client, Response

__all__ = ["Compiled", "Endpoint", "Engine", "Phase", "Request", "no_phase", "parse_endpoint"]

Phase = Callable[[str], contextlib.AbstractContextManager[None]]
"""What times a step of that name: `rekindle.report.Report.phase`, or `no_phase`."""


def no_phase(name: str) -> contextlib.AbstractContextManager[None]:  # noqa: ARG001
    return contextlib.nullcontext()


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """Graphs that a server loaded from its cache, and those that it compiled, with the seconds for each."""

    loaded: int = 0
    loaded_seconds: float = 0.0
    compiled: int = 0
    compiled_seconds: float = 0.0


class Engine(Protocol):
    """What the rest of rekindle asks of an engine."""

    name: str
    endpoint: Endpoint
    compiles: bool
    """Whether its servers keep kernel caches in the usual places, also where no variable names one."""

    def environment(self) -> Mapping[str, str]:
        """What a server needs in its environment so that it can be snapshotted."""

    def cache_environment(self, directory: Path) -> Mapping[str, str]:
        """The variables that make the server keep its kernel caches in a directory."""

    def launch(self, argv: Sequence[str], environment: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
        """How a command is started so that the server can be put to sleep: other words, other variables. Not
        recorded: what starts without us needs none of it."""
        return list(argv), dict(environment)

    def enter(self, root: Path) -> None:  # noqa: ARG002
        """Told before a server starts, and after it was restored, where the file system of its cell is."""
        return

    def known_oracle(self) -> "tuple[Request, JSON] | None":
        """A question that the server has asked itself, and the answer, where it takes no other before the
        snapshot."""
        return None

    def quiesce(self, client: "Client", expected: JSON, request: Request) -> None:  # noqa: ARG002
        """Puts the server to sleep, once it was seen that it answers as before when it wakes. Raises
        OracleError if not."""
        return

    def wake(self, client: "Client", phase: Phase) -> None:  # noqa: ARG002
        """Wakes a restored server, a phase for each step. Raises WorkloadError, NotReadyError."""
        return

    def ready(self, client: "Client", timeout: float) -> bool:
        """Whether the server takes requests now. Raises OSError as long as it cannot be reached."""

    def warm_requests(self, client: "Client") -> Sequence[Sequence[Request]]:
        """What to ask before the snapshot: one batch after the other, each batch at once."""

    def oracle_request(self, client: "Client") -> Request:
        """The question whose answer proves the server."""

    def answer(self, response: "Response") -> JSON:
        """What of a response must be the same at every asking. Raises OracleError if it is no answer."""

    def authorize(self, request: Request, environment: Mapping[str, str]) -> Request:
        """The request with the credentials that this server asks for; they are never recorded."""

    def agree(self, expected: JSON, got: JSON) -> bool:
        """Whether two answers are the same but for rounding."""

    def model(self, argv: Sequence[str]) -> tuple[str, str] | None:
        """The model that a command loads, and its revision on a hub; None if it cannot be told."""

    def milestones(self) -> Sequence[tuple[str, str]]:
        """How a start is divided: (phase, text in the server's log that ends it), in order."""

    def compiled(self, log: str) -> "Compiled":
        """What a server's log says of its kernel cache: how much was loaded from it, and what was not."""

    def disposable(self) -> Sequence[str]:
        """Patterns of files below TMPDIR that the server can do without once it runs."""

    def options(self) -> dict[str, JSON]:
        """What `restored` needs to make this engine again, for the record."""
