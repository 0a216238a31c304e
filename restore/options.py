# SPDX-License-Identifier: Apache-2.0
"""What a restore may be asked for, and who is told how it goes."""

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
    """How a process gets its memory back: the memory files of the dump are mapped, and shared by all
    replicas; or their pages are copied, for each replica anew."""

    MAP = "map"
    COPY = "copy"


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """Our descriptors that the server gets as its standard output and standard error."""

    stdout: int = 1
    stderr: int = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What `rekindle restore` may be told. Raises UsageError for what contradicts itself.

    `image` is a reference as users write it. `command` is the server that a lower rung starts, and that the
    process stands in for; empty: the recorded one. `rung` is the first to try, `require` the lowest to take.
    Deadlines are in seconds from our start until the rung must be done; None: an estimate decides. `publish`
    is `[HOST:]PORT`; None: where the server listens. `ready_url` belongs to a command that is not vLLM.
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
            raise UsageError("--ready-url needs a COMMAND", hint="the record knows the recorded server")


class Listener:
    """Who is told how a restore goes. This one keeps silent; override what matters."""

    def say(self, text: str) -> None:
        """A line for people, at each step."""

    def progress(self, tally: "Tally | None") -> contextlib.AbstractContextManager[None]:  # noqa: ARG002
        """Bytes are being fetched within the context, which `tally` counts; None: nothing is fetched."""
        return contextlib.nullcontext()

    def ready(self, report: Report) -> None:
        """The report is complete: the server is ready, or has ended before it was."""

    def interrupted(self, report: Report) -> None:
        """A signal ends us before the server is ready. The report says so; the clean-up is yet to come."""

    def failed(self, report: Report) -> None:
        """No rung could be taken, and all is cleaned up; the report says why."""
