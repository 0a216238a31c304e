# SPDX-License-Identifier: Apache-2.0
"""How registries are reached, and who is trusted: what a caller may choose, before anything is read."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from oci.trust.policy import TrustRule


@dataclass(frozen=True, slots=True, kw_only=True)
class RegistryOptions:
    """How registries are reached. None: as config.toml or the default says.

    `limit_rate` is in bytes a second, of all connections together; `mirrors` are URLs that are asked first.
    """

    jobs: int | None = None
    limit_rate: float | None = None
    mirrors: tuple[str, ...] = ()
    plain_http: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrustOptions:
    """Who is trusted.

    `rule` names keys and identities, and takes the place of a policy; `policy` is a policy file, and None
    means that of $REKINDLE_HOME, if there is one.
    """

    rule: "TrustRule | None" = None
    policy: Path | None = None
    allow_rollback: bool = False
    skip_verification: bool = False
