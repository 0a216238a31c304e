# SPDX-License-Identifier: Apache-2.0
"""Read the configuration file: `$REKINDLE_CONFIG`, or else `$REKINDLE_HOME/config.toml`.

docs/operations.md explains it.

    [limits]                                upper bounds for images from elsewhere
    manifest_bytes = 4194304
    record_bytes = 16777216
    layers = 1000
    expansion_ratio = 200

    [transfer]
    jobs = 16                               parallel connections
    connect_seconds = 10
    stall_seconds = 30                      a connection without data for this long is broken
    attempts = 5                            in a row without a byte, before a request fails
    longest_wait_seconds = 60               fail if a registry asks for a longer one (Retry-After)

    [registry."registry.example.com"]
    mirrors = ["http://127.0.0.1:30020"]    tried first, in order; their bytes are checked by digest
    plain_http = false                      the default is true for registries on loopback only
    ca_file = "/etc/ssl/our-ca.pem"         instead of the system's authorities
    cert_file = "/etc/ssl/node.pem"         our client certificate, with its key
    key_file = "/etc/ssl/node-key.pem"
    chunk_bytes = 100000000                 upload larger blobs in several requests
"""

import os
from collections.abc import Collection, Mapping
from pathlib import Path

from msgspec import Struct, field

from rekindle.errors import FormatError, UsageError
from rekindle.fields import Fields, text_item

_FILE_LIMIT_BYTES = 1 << 20
_MIRRORS_LIMIT = 16
JOBS_LIMIT = 256
_BOUNDS = {"jobs": JOBS_LIMIT}
_CONNECTING = frozenset({"jobs", "connect_seconds", "stall_seconds"})
_RETRYING = frozenset({"attempts", "longest_wait_seconds"})


class Limits(Struct, frozen=True, kw_only=True):
    """Upper bounds for an image from elsewhere."""

    manifest_bytes: int = 4 << 20
    record_bytes: int = 16 << 20
    layers: int = 1000
    expansion_ratio: int = 200

    def expanded_bytes(self, stored_bytes: int) -> int:
        """Return the limit for an unpacked layer, at least 1 GiB.

        The ratio alone would reject small layers: memory of one repeated byte compresses to almost nothing.
        """
        return max(1 << 30, stored_bytes * self.expansion_ratio)


class RetryPolicy(Struct, frozen=True, kw_only=True):
    """The number of attempts and the pauses between them.

    The first pause takes up to `first_pause_seconds`, each further one twice as long, and none more than
    `longest_wait_seconds`. If a registry asks for a longer pause, the request fails.
    """

    attempts: int = 5
    longest_wait_seconds: float = 60
    first_pause_seconds: float = 0.2


class TransferSettings(Struct, frozen=True, kw_only=True):
    """Settings for transfers: the number of connections, timeouts and retries."""

    jobs: int = 16
    connect_seconds: float = 10
    stall_seconds: float = 30
    retry: RetryPolicy = field(default_factory=RetryPolicy)


class RegistrySettings(Struct, frozen=True, kw_only=True):
    """Settings for connecting to one registry."""

    mirrors: tuple[str, ...] = ()
    plain_http: bool | None = None  # None: for loopback only
    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None
    chunk_bytes: int | None = None  # None: each blob in one request


class Config(Struct, frozen=True, kw_only=True):
    """The settings of the configuration file. `registries` maps `HOST` or `HOST:PORT` to settings."""

    limits: Limits = field(default_factory=Limits)
    transfer: TransferSettings = field(default_factory=TransferSettings)
    registries: Mapping[str, RegistrySettings] = field(default_factory=dict)

    def registry(self, host: str) -> RegistrySettings:
        return self.registries.get(host, RegistrySettings())

    @classmethod
    def read(cls, home: Path) -> "Config":
        """Read the file; return the defaults if there is none. Raises UsageError for an invalid one."""
        named = os.environ.get("REKINDLE_CONFIG")
        path = Path(named) if named else home / "config.toml"
        try:
            content = path.read_bytes()
        except FileNotFoundError as error:
            if named:
                raise UsageError(f"cannot read {path}", cause=str(error)) from None
            return cls()
        except OSError as error:
            raise UsageError(f"cannot read {path}", cause=str(error)) from None
        try:
            return cls.parse(content)
        except FormatError as error:
            raise UsageError(
                f"{path} is not valid",
                cause=error.summary,
                hint="see docs/operations.md for the settings",
            ) from None

    @classmethod
    def parse(cls, content: bytes) -> "Config":
        """Read the content of the file. Raises FormatError."""
        document = Fields.parse_toml(content, "the configuration", limit_bytes=_FILE_LIMIT_BYTES)
        document.only({"limits", "transfer", "registry"})
        tables = {"limits": {}, "transfer": {}, "registry": {}, **document.as_json()}
        return cls(
            limits=Limits(**_integers(tables["limits"], "limits", set(Limits.__struct_fields__))),
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
    given.only({"mirrors", "plain_http", "ca_file", "cert_file", "key_file", "chunk_bytes"})
    if given.has("cert_file") != given.has("key_file"):
        raise FormatError(f"{where} needs cert_file and key_file together")
    mirrors = given.list_of("mirrors", text_item, at_most=_MIRRORS_LIMIT) if given.has("mirrors") else []
    return RegistrySettings(
        mirrors=tuple(mirrors),
        plain_http=given.boolean("plain_http", default=False) if given.has("plain_http") else None,
        ca_file=_path(given, "ca_file"),
        cert_file=_path(given, "cert_file"),
        key_file=_path(given, "key_file"),
        chunk_bytes=given.integer("chunk_bytes", at_least=1) if given.has("chunk_bytes") else None,
    )


def _path(given: Fields, name: str) -> Path | None:
    return Path(given.text(name)) if given.has(name) else None
