# SPDX-License-Identifier: Apache-2.0
"""The options of a caller: how to reach registries, and whom to trust."""

from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import Struct

if TYPE_CHECKING:
    from oci.trust.policy import TrustRule


class RegistryOptions(Struct, frozen=True, kw_only=True):
    """Options for reaching registries. None means the value in config.toml, or the default.

    `limit_rate` is in bytes per second, over all connections. `mirrors` are URLs to try first.
    """

    jobs: int | None = None
    limit_rate: float | None = None
    mirrors: tuple[str, ...] = ()
    plain_http: bool | None = None


class TrustOptions(Struct, frozen=True, kw_only=True):
    """Whom to trust.

    `rule` names keys and identities and replaces any policy. `policy` is a policy file; None means the one in
    $REKINDLE_HOME, if it exists.
    """

    rule: "TrustRule | None" = None
    policy: Path | None = None
    allow_rollback: bool = False
    skip_verification: bool = False
