# SPDX-License-Identifier: Apache-2.0
"""Where a server listens, and what is asked of it: the values that engines and the HTTP client share."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from rekindle.errors import FormatError, UsageError
from rekindle.fields import JSON

# What HTTP/1.1 lets through (RFC 9110 and 9112), so that a request cannot be more than one.
_METHOD = re.compile(r"[A-Za-z]+")
_PATH = re.compile(r"/[!-~]*")
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_HEADER_VALUE = re.compile(r"[\t -~\x80-\xff]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """The TCP address that a server listens on."""

    host: str
    port: int

    @property
    def reachable_host(self) -> str:
        """Where a client on the same machine finds it: a server on every address is on loopback too."""
        return {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """An HTTP request. `body` is JSON, or None for no body."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: JSON

    def to_json(self) -> dict[str, JSON]:
        return {
            "method": self.method,
            "path": self.path,
            "headers": dict(self.headers),
            "body": self.body,
        }

    @classmethod
    def from_json(cls, value: JSON) -> "Request":
        """Raises FormatError if this is no request."""
        match value:
            case {"path": str(path)} if _PATH.fullmatch(path):
                method = value.get("method", "POST" if "body" in value else "GET")
                headers = value.get("headers", {})
                if (
                    isinstance(method, str)
                    and _METHOD.fullmatch(method)
                    and isinstance(headers, dict)
                    and all(isinstance(part, str) for pair in headers.items() for part in pair)
                    and all(_HEADER_NAME.fullmatch(name) for name in headers)
                    and all(_HEADER_VALUE.fullmatch(content) for content in headers.values())
                ):
                    return cls(method=method, path=path, headers=headers, body=value.get("body"))
        raise FormatError(
            "this is not a request",
            cause=str(value)[:200],
            hint='write {"method": "POST", "path": "/…", "headers": {}, "body": …}',
        )


def parse_endpoint(text: str, default_host: str) -> Endpoint:
    """`PORT`, `HOST:PORT` or `[HOST]:PORT`. Raises UsageError."""
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not port.isdecimal() or not 0 < int(port) < 65536 or (colon and not host):
        raise UsageError(f"--publish {text} is not of the form [HOST:]PORT")
    return Endpoint(host=host or default_host, port=int(port))
