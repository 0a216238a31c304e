# SPDX-License-Identifier: Apache-2.0
"""The configuration file: `$REKINDLE_HOME/config.toml`, or what `$REKINDLE_CONFIG` names.

docs/operations.md explains it.

    [limits]                                how much of foreign bytes is taken
    manifest_bytes = 4194304
    record_bytes = 16777216
    layers = 1000
    expansion_ratio = 200

    [transfer]
    jobs = 16                               connections at once
    connect_seconds = 10
    stall_seconds = 30                      without news, a connection counts as broken
    attempts = 5                            in a row without a byte, until a request has failed
    longest_wait_seconds = 60               a registry that asks for more (Retry-After) has failed

    [registry."registry.example.com"]
    mirrors = ["http://127.0.0.1:30020"]    tried first, in this order; the digest is the judge
    plain_http = false                      true for registries on loopback, unless this says otherwise
    ca_file = "/etc/ssl/our-ca.pem"         in place of the system's authorities
    cert_file = "/etc/ssl/node.pem"         the certificate that we show, with its key
    key_file = "/etc/ssl/node-key.pem"
"""

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

from rekindle.errors import FormatError, UsageError
from rekindle.fields import Fields, text_item

_FILE_LIMIT_BYTES = 1 << 20
_MIRRORS_LIMIT = 16
JOBS_LIMIT = 256
_BOUNDS = {"jobs": JOBS_LIMIT}
_CONNECTING = frozenset({"jobs", "connect_seconds", "stall_seconds"})
_RETRYING = frozenset({"attempts", "longest_wait_seconds"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What an image from elsewhere may be at most. Sizes are in bytes."""

    manifest_bytes: int = 4 << 20
    record_bytes: int = 16 << 20
    layers: int = 1000
    expansion_ratio: int = 200

    def expanded_bytes(self, stored_bytes: int) -> int:
        """How much a layer may become. A gigabyte is never a bomb, and constant memory shrinks to nothing."""
        return max(1 << 30, stored_bytes * self.expansion_ratio)


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How often something is attempted, and how long the pauses in between are.

    The first pause takes up to `first_pause_seconds`, each further one twice as long, none more than
    `longest_wait_seconds`. A registry that asks for a longer one has failed.
    """

    attempts: int = 5
    longest_wait_seconds: float = 60
    first_pause_seconds: float = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferSettings:
    """How registries are spoken to: over how many connections at once, and how patiently."""

    jobs: int = 16
    connect_seconds: float = 10
    stall_seconds: float = 30
    retry: RetryPolicy = field(default_factory=RetryPolicy)


@dataclass(frozen=True, slots=True, kw_only=True)
class RegistrySettings:
    """How one registry is reached."""

    mirrors: tuple[str, ...] = ()
    plain_http: bool | None = None  # None: for loopback only
    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """All that the file may say. Registries are by host, with the port if there is one."""

    limits: Limits = field(default_factory=Limits)
    transfer: TransferSettings = field(default_factory=TransferSettings)
    registries: Mapping[str, RegistrySettings] = field(default_factory=dict)

    def registry(self, host: str) -> RegistrySettings:
        return self.registries.get(host, RegistrySettings())

    @classmethod
    def read(cls, home: Path) -> "Config":
        """Raises UsageError for a file that cannot be used; without one, the defaults."""
        named = os.environ.get("REKINDLE_CONFIG")
        path = Path(named) if named else home / "config.toml"
        try:
            content = path.read_bytes()
        except FileNotFoundError as error:
            if named:
                raise UsageError(f"{path} cannot be read", cause=str(error)) from None
            return cls()
        except OSError as error:
            raise UsageError(f"{path} cannot be read", cause=str(error)) from None
        try:
            return cls.parse(content)
        except FormatError as error:
            raise UsageError(
                f"{path} is not as it should be",
                cause=": ".join(part for part in (error.message, error.cause) if part),
                hint="docs/operations.md shows what it may say",
            ) from None

    @classmethod
    def parse(cls, content: bytes) -> "Config":
        """Raises FormatError."""
        document = Fields.parse_toml(content, "it", limit_bytes=_FILE_LIMIT_BYTES)
        document.only({"limits", "transfer", "registry"})
        tables = {"limits": {}, "transfer": {}, "registry": {}, **document.as_json()}
        return cls(
            limits=Limits(**_integers(tables["limits"], "limits", {each.name for each in fields(Limits)})),
            transfer=_transfer(tables["transfer"]),
            registries={
                host: _registry(value, f"registry.{host}")
                for host, value in Fields(tables["registry"], "registry").as_json().items()
            },
        )


def _integers(value: object, where: str, known: Collection[str]) -> dict[str, int]:
    given = Fields(value, where)
    given.only(set(known))
    return {
        name: given.integer(name, at_least=1, at_most=_BOUNDS.get(name, 1 << 62))
        for name in known
        if given.has(name)
    }


def _transfer(value: object) -> TransferSettings:
    given = _integers(value, "transfer", {*_CONNECTING, *_RETRYING})
    retry = RetryPolicy(**{name: given.pop(name) for name in _RETRYING & given.keys()})
    return TransferSettings(**given, retry=retry)


def _registry(value: object, where: str) -> RegistrySettings:
    given = Fields(value, where)
    given.only({"mirrors", "plain_http", "ca_file", "cert_file", "key_file"})
    if given.has("cert_file") != given.has("key_file"):
        raise FormatError(f"{where} needs cert_file and key_file together")
    mirrors = given.list_of("mirrors", text_item, at_most=_MIRRORS_LIMIT) if given.has("mirrors") else []
    return RegistrySettings(
        mirrors=tuple(mirrors),
        plain_http=given.truth("plain_http", default=False) if given.has("plain_http") else None,
        ca_file=_path(given, "ca_file"),
        cert_file=_path(given, "cert_file"),
        key_file=_path(given, "key_file"),
    )


def _path(given: Fields, name: str) -> Path | None:
    return Path(given.text(name)) if given.has(name) else None
