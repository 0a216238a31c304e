# SPDX-License-Identifier: Apache-2.0
"""The options of a restore, and the listener that is told of its progress."""

import contextlib
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from oci.options import RegistryOptions, TrustOptions
from rekindle.errors import UsageError
from rekindle.report import Report, Rung

if TYPE_CHECKING:
    from oci.progress import Tally


class Memory(StrEnum):
    """How a restored process gets its memory.

    `map`: from the dump's memory files, which all replicas share. `copy`: copied for each replica.
    """

    MAP = "map"
    COPY = "copy"


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """The descriptors of ours that the server gets as its stdout and stderr."""

    stdout: int = 1
    stderr: int = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The options of `rekindle restore`. Raises UsageError if they contradict each other.

    `image` is a reference as users write it. `command` is the server that the process replaces and that a
    lower rung starts; empty for the recorded one. `rung` is the first rung to try, `require` the lowest to
    take. Deadlines are in seconds, for the process from the start of rekindle, for the cache from the start
    of its rung; None derives them from an estimate. `publish` is `[HOST:]PORT`; None for the address that
    the server listens on. `ready_url` is for a command other than vLLM: it answers 2xx once it is ready.
    """

    image: str
    command: tuple[str, ...] = ()
    rung: Rung = Rung.PROCESS
    require: Rung = Rung.COLD
    publish: str | None = None
    ready_url: str | None = None
    ready_file: Path | None = None
    process_deadline: float | None = None
    cache_deadline: float | None = None
    cache_dir: Path | None = None
    paranoid: bool = False
    memory: Memory = Memory.MAP
    trust: TrustOptions = field(default_factory=TrustOptions)
    registry: RegistryOptions = field(default_factory=RegistryOptions)
    output: Output = field(default_factory=Output)

    def __post_init__(self) -> None:
        rungs = list(Rung)
        if rungs.index(self.rung) > rungs.index(self.require):
            raise UsageError(f"--rung {self.rung} is below --require {self.require}")
        if self.ready_url and not self.command:
            raise UsageError("--ready-url needs a COMMAND", hint="omit it: the image records its own server")


class Listener:
    """Receives the events of a restore. All methods do nothing here; override those that you need."""

    def say(self, text: str) -> None:
        """Receive a line for people, at each step."""

    def progress(self, tally: "Tally | None") -> contextlib.AbstractContextManager[None]:  # noqa: ARG002
        """Return a context in which bytes are fetched, counted by `tally`; None if nothing is fetched."""
        return contextlib.nullcontext()

    def ready(self, report: Report) -> None:
        """Receive the complete report once the server is ready, or has exited before it was."""

    def interrupted(self, report: Report) -> None:
        """Receive the report when a signal ends the restore before the server is ready, before clean-up."""

    def failed(self, report: Report) -> None:
        """Receive the report when no rung could be taken, after clean-up."""
