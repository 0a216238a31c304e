# SPDX-License-Identifier: Apache-2.0
"""Engines: the knowledge about each kind of server.

An engine knows where the server listens, when it is ready, which requests warm it, which request proves it
(the oracle's) and which part of the answer counts. It only speaks HTTP; it starts and stops nothing.

    vllm    recognized by the command: `vllm serve …`, `python -m vllm.entrypoints.openai.api_server …`
    http    any other server: a URL that answers when it is ready, and a file with the oracle's request
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from msgspec import Struct

from rekindle.engine import variables
from rekindle.engine.address import Endpoint, Request, parse_endpoint
from rekindle.fields import JSON

if TYPE_CHECKING:
    from rekindle.engine.client import Client, Response

__all__ = ["Compiled", "Endpoint", "Engine", "Phase", "Request", "no_phase", "parse_endpoint"]

Phase = Callable[[str], contextlib.AbstractContextManager[None]]
"""Times a step of the given name: `rekindle.report.Report.phase`, or `no_phase`."""


def no_phase(name: str) -> contextlib.AbstractContextManager[None]:  # noqa: ARG001
    return contextlib.nullcontext()


class Compiled(Struct, frozen=True, kw_only=True):
    """The graphs that a server loaded from its cache and those it compiled: numbers and total seconds."""

    loaded: int = 0
    loaded_seconds: float = 0.0
    compiled: int = 0
    compiled_seconds: float = 0.0


class Engine(Protocol):
    """The interface of an engine."""

    name: str
    endpoint: Endpoint
    compiles: bool
    """Whether its servers use the kernel caches' default paths where no variable is set."""
    serves_one_port: bool
    """Whether clients use only `endpoint`, and all other ports are for the server's own processes."""

    def environment(self) -> Mapping[str, str]:
        """Return the variables that a server needs so that it can be snapshotted."""

    def cache_environment(self, directory: Path) -> Mapping[str, str]:
        """Return the variables that make the server keep its kernel caches in a directory."""

    def launch(self, argv: Sequence[str], environment: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
        """Return the command line and variables that start the server so that it can be put to sleep.

        They are not recorded: a server that starts without us does not need them.
        """
        return list(argv), dict(environment)

    def reads(self, name: str) -> bool:
        """Tell whether its servers read a variable, so that another value forbids to restore the process."""
        return variables.is_of_libraries(name)

    def in_cache_keys(self, name: str) -> bool:
        """Tell whether a variable may be part of the key of a kernel cache."""
        return variables.is_of_compilers(name)

    def replays(self, name: str) -> bool:
        """Tell whether a start on the kernel cache gets the recorded value of a variable that is not set.

        Only the values of these are recorded. They must do nothing but choose kernels.
        """
        return variables.chooses_kernels(name)

    def enforced(self) -> frozenset[str]:
        """Return the variables and options whose value of today holds whatever the restored server has.

        What passes requests on to the server applies them, so they are not compared.
        """
        return frozenset()

    def enter(self, root: Path) -> None:  # noqa: ARG002
        """Take note of the root of the cell's file system, before a server starts and after a restore."""
        return

    def known_oracle(self) -> "tuple[Request, JSON] | None":
        """Return the request that a server sent to itself and its answer, or None.

        For servers that accept no other request before the snapshot. Raises OracleError.
        """
        return None

    def quiesce(self, client: "Client", expected: JSON, request: Request) -> None:  # noqa: ARG002
        """Put the server to sleep, after checking that it answers as before once it wakes.

        Raises OracleError if it does not, and WorkloadError.
        """
        return

    def wake(self, client: "Client", phase: Phase) -> None:  # noqa: ARG002
        """Wake a restored server, with a phase for each step. Raises WorkloadError, NotReadyError."""
        return

    def ready(self, client: "Client", timeout: float) -> bool:
        """Tell whether the server accepts requests now. Raises OSError while it cannot be reached."""

    def warm_requests(self, client: "Client") -> Sequence[Sequence[Request]]:
        """Return batches of requests to send before the snapshot, the requests of a batch in parallel."""

    def oracle_request(self, client: "Client") -> Request:
        """Return the request whose answer proves the server."""

    def answer(self, response: "Response") -> JSON:
        """Return the part of a response that must always be the same. Raises OracleError if it has none."""

    def authorize(self, request: Request, environment: Mapping[str, str]) -> Request:
        """Return the request with the credentials that this server requires; they are never recorded."""

    def require_accepted(self, client: "Client") -> None:  # noqa: ARG002
        """Raise MismatchError unless the restored server accepts every client that a start today would."""
        return

    def agree(self, expected: JSON, got: JSON) -> bool:
        """Tell whether two answers are equal up to rounding."""

    def model(self, argv: Sequence[str]) -> tuple[str, str] | None:
        """Return the model that a command loads and its revision on a hub; None if unknown."""

    def milestones(self) -> Sequence[tuple[str, str]]:
        """Return the phases of a start, in order, each with the text in the server's log that ends it."""

    def compiled(self, log: str) -> "Compiled":
        """Read from a server's log how much it loaded from its kernel cache and how much it compiled."""

    def disposable(self) -> Sequence[str]:
        """Return glob patterns of files below TMPDIR that a running server does not need any more."""

    def options(self) -> dict[str, JSON]:
        """Return what `choose.from_record` needs to create this engine again, for the record."""
