# SPDX-License-Identifier: Apache-2.0
"""What a snapshot may be asked for."""

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from oci.options import RegistryOptions
from rekindle.cell import Network
from rekindle.engine.choose import Weights
from rekindle.errors import UsageError

if TYPE_CHECKING:
    from oci.progress import Tally
    from oci.trust.signer import Sign


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotOptions:
    """What `rekindle snapshot` may be told. Raises UsageError for what contradicts itself.

    `image` is a reference as users write it, `command` the server. A server that is not vLLM needs
    `ready_url`, which answers 2xx once it is ready, and `oracle_file`, the request whose answer proves it.
    `warm_file` holds requests, a JSON object a line. `ready_seconds` bounds its start. `weights` is for vLLM
    on a GPU; None chooses. `secrets` names what the image may hold. `sign` is how the image is signed besides
    by this machine's key; `private_variables` are those that the server must not get. `keep_dump` gets a copy
    of CRIU's dump before anything is taken out of it.
    """

    image: str
    command: tuple[str, ...]
    network: Network = Network.PRIVATE
    ready_seconds: float = 1800.0
    ready_url: str | None = None
    oracle_file: Path | None = None
    warm_file: Path | None = None
    weights: Weights | None = None
    prove: bool = True
    with_cache: bool = True
    secrets: tuple[str, ...] = ()
    sign: "Sign | None" = None
    private_variables: frozenset[str] = frozenset()
    registry: RegistryOptions = field(default_factory=RegistryOptions)
    keep_dump: Path | None = None

    def __post_init__(self) -> None:
        if not self.command:
            raise UsageError("there is no command", hint="rekindle snapshot IMAGE -- vllm serve MODEL")
        if self.oracle_file and not self.ready_url:
            raise UsageError("--oracle-request goes with --ready-url")


class Progress:
    """Who is shown how much was sent. This one shows nothing."""

    def sending(self, tally: "Tally") -> contextlib.AbstractContextManager[None]:  # noqa: ARG002
        """Bytes are sent within the context, which `tally` counts."""
        return contextlib.nullcontext()
