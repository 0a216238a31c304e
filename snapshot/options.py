# SPDX-License-Identifier: Apache-2.0
"""The options of a snapshot."""

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import Struct, field

from oci.options import RegistryOptions
from rekindle.cell import Network
from rekindle.cell.hook import Reseed
from rekindle.engine.choose import Weights
from rekindle.environment import KEY_VARIABLES
from rekindle.errors import UsageError
from snapshot.outside_connections import Outside

if TYPE_CHECKING:
    from oci.progress import Tally
    from oci.trust.signer import Sign


READY_SECONDS = 1800.0
"""The seconds in which a server must become ready, by default."""


class SnapshotOptions(Struct, frozen=True, kw_only=True):
    """The options of `rekindle snapshot`. Raises UsageError if they contradict each other.

    `image` is a reference as users write it, `command` starts the server. A server other than vLLM needs
    `ready_url`, which answers 2xx once it is ready, and `oracle_file`, the request whose answer proves it.
    `ready_seconds` limits its start. `warm_file` holds requests, one JSON object per line. `weights` is for
    vLLM on a GPU; None chooses. `check_memory`: refuse GPU state for which no host memory is available now.
    `reseed` is what to reseed after a restore, `outside` what to do about connections that lead out of the
    server. `secrets` names the secrets that the image may hold. `sign` signs the image, in addition to this
    machine's key. `private_variables` are withheld from the server. `keep_dump` is a directory for a copy of
    CRIU's unmodified dump. With `neutral`, a neutral process is saved, too, if there can be one.
    """

    image: str
    command: tuple[str, ...]
    network: Network = Network.PRIVATE
    ready_seconds: float = READY_SECONDS
    ready_url: str | None = None
    oracle_file: Path | None = None
    warm_file: Path | None = None
    weights: Weights | None = None
    reseed: Reseed = Reseed.UNSEEDED
    outside: Outside = Outside.REFUSE
    prove: bool = True
    with_cache: bool = True
    neutral: bool = False
    check_memory: bool = True
    secrets: tuple[str, ...] = ()
    sign: "Sign | None" = None
    private_variables: frozenset[str] = KEY_VARIABLES
    registry: RegistryOptions = field(default_factory=RegistryOptions)
    keep_dump: Path | None = None

    def __post_init__(self) -> None:
        if not self.command:
            raise UsageError("no command", hint="rekindle snapshot IMAGE -- vllm serve MODEL")
        if self.oracle_file and not self.ready_url:
            raise UsageError("--oracle-request needs --ready-url")


class ReplicaOptions(Struct, frozen=True, kw_only=True):
    """Options for saving a replica as `image`, a reference as users write it.

    With `runs_on`, the replica runs on as soon as its dump is complete; else it ends once the image is
    published. `outside`, `prove`, `secrets`, `sign` and `registry` are as in SnapshotOptions.
    """

    image: str
    runs_on: bool = False
    outside: Outside = Outside.REFUSE
    prove: bool = True
    secrets: tuple[str, ...] = ()
    sign: "Sign | None" = None
    registry: RegistryOptions = field(default_factory=RegistryOptions)


class Progress:
    """Shows the progress of a snapshot. This one shows nothing; override `sending`."""

    def sending(self, tally: "Tally") -> contextlib.AbstractContextManager[None]:  # noqa: ARG002
        """Return a context in which bytes are sent, counted by `tally`."""
        return contextlib.nullcontext()
