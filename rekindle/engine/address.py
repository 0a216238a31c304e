# SPDX-License-Identifier: Apache-2.0
"""Endpoint and Request: the values that engines and the HTTP client share."""

from collections.abc import Mapping
from typing import Annotated

from msgspec import Meta, Struct

from rekindle import documents
from rekindle.documents import whole
from rekindle.errors import FormatError, UsageError
from rekindle.fields import JSON

# What HTTP/1.1 allows (RFC 9110 and 9112), so that one request cannot smuggle in another.
_Method = Annotated[str, Meta(pattern=whole("[A-Za-z]+"))]
_Path = Annotated[str, Meta(pattern=whole("/[!-~]*"))]
_HeaderName = Annotated[str, Meta(pattern=whole("[!#$%&'*+.^_`|~0-9A-Za-z-]+"))]
_HeaderValue = Annotated[str, Meta(pattern=whole(r"[\t -~\x80-\xff]*"))]


class Endpoint(Struct, frozen=True, kw_only=True):
    """The TCP address that a server listens on."""

    host: str
    port: Annotated[int, Meta(ge=1, le=65535)]

    @property
    def reachable_host(self) -> str:
        """The host for a client on the same machine: loopback for a server that listens on every address."""
        return {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Request(Struct, frozen=True, kw_only=True):
    """An HTTP request. `body` is JSON, or None for no body."""

    method: _Method
    path: _Path
    headers: Mapping[_HeaderName, _HeaderValue] = {}
    body: JSON = None

    def to_json(self) -> dict[str, JSON]:
        return documents.to_json(self)

    @classmethod
    def from_json(cls, value: JSON) -> "Request":
        """Parse a request. The method defaults to POST with a body and GET without. Raises FormatError."""
        if isinstance(value, dict):
            value = {"method": "POST" if "body" in value else "GET", **value}
        try:
            return documents.read(value, cls, "request")
        except FormatError as error:
            error.hint = 'write {"method": "POST", "path": "/…", "headers": {}, "body": …}'
            raise


def parse_endpoint(text: str, default_host: str) -> Endpoint:
    """Parse `PORT`, `HOST:PORT` or `[HOST]:PORT`. Raises UsageError."""
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not port.isdecimal() or not 0 < int(port) < 65536 or (colon and not host):
        raise UsageError(f"invalid --publish {text!r}", hint="write [HOST:]PORT[:SERVERPORT]")
    return Endpoint(host=host or default_host, port=int(port))
