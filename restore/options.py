# SPDX-License-Identifier: Apache-2.0
"""The options of a restore."""

from enum import StrEnum
from pathlib import Path

from msgspec import Struct, field

from oci.options import RegistryOptions, TrustOptions
from rekindle.errors import UsageError
from rekindle.report import Rung
from restore.client_address import ClientAddress


class Memory(StrEnum):
    """The way in which a restored process gets its memory.

    `map`: from the dump's memory files, which all replicas share. `copy`: copied for each replica.
    """

    MAP = "map"
    COPY = "copy"


class Lazy(StrEnum):
    """Whether a server may start before all of its image is here.

    `auto`: from a registry, if its memory is large enough to gain something. `always`: of any size. `never`.
    """

    AUTO = "auto"
    ALWAYS = "always"
    NEVER = "never"


class Output(Struct, frozen=True, kw_only=True):
    """The descriptors of ours that the server gets as its stdout and stderr."""

    stdout: int = 1
    stderr: int = 2


class Options(Struct, frozen=True, kw_only=True):
    """The options of `rekindle restore`. Raises UsageError if they contradict each other.

    `image` is a reference as users write it. `command` is the server that the process replaces and that a
    lower rung starts; empty for the recorded one. `rung` is the first rung to try, `require` the lowest to
    take. Deadlines are in seconds, for the process from the start of rekindle, for the cache from the start
    of its rung; None derives them from an estimate. `publish` are addresses of this host, `[HOST:]PORT`, or
    `[HOST:]PORT:SERVERPORT` for a port of the server other than its main one; None for the addresses that
    the server listens on. With `listen_early`, clients may connect before the server is ready, and wait.
    With `shared_port`, replicas may have the same address: a connection goes to the one with the fewest.
    `client_address` is how the server learns the addresses of clients that reach it through us.
    `ready_url` is for a command other than vLLM: it answers 2xx once it is ready.
    `listening` are descriptors of sockets that listen at published addresses already. `replica_index` is that
    of one of several replicas, whose ports are apart. `waited_seconds`, for which this process has waited to
    be needed, do not count as part of the restore.
    `accept_environment` are names or patterns of variables that may differ from the snapshot's. `gpus` are
    the UUIDs of the GPUs to restore the process onto, in the order of the recorded ones. With `prefetch`,
    what a server that is started anew will read is read ahead.
    """

    image: str
    command: tuple[str, ...] = ()
    rung: Rung = Rung.PROCESS
    require: Rung = Rung.COLD
    publish: str | tuple[str, ...] | None = None
    listen_early: bool = False
    shared_port: bool = False
    client_address: ClientAddress | None = None
    listening: tuple[int, ...] = ()
    replica_index: int = 0
    waited_seconds: float = 0.0
    ready_url: str | None = None
    ready_file: Path | None = None
    process_deadline: float | None = None
    cache_deadline: float | None = None
    cache_dir: Path | None = None
    paranoid: bool = False
    memory: Memory = Memory.MAP
    lazy: Lazy = Lazy.AUTO
    prefetch: bool = True
    accept_environment: tuple[str, ...] = ()
    gpus: tuple[str, ...] = ()
    trust: TrustOptions = field(default_factory=TrustOptions)
    registry: RegistryOptions = field(default_factory=RegistryOptions)
    output: Output = field(default_factory=Output)

    def __post_init__(self) -> None:
        rungs = list(Rung)
        if rungs.index(self.rung) > rungs.index(self.require):
            raise UsageError(f"--rung {self.rung} is below --require {self.require}")
        if self.shared_port and self.require is not Rung.PROCESS:
            raise UsageError(
                "--shared-port needs --require process",
                cause="on a lower rung, a server opens its port itself",
            )
        if self.ready_url and not self.command:
            raise UsageError("--ready-url needs a COMMAND", hint="omit it: the image records its own server")

    @property
    def published(self) -> tuple[str, ...]:
        """The addresses to publish; empty for those that the server listens on."""
        return (self.publish,) if isinstance(self.publish, str) else self.publish or ()
