# SPDX-License-Identifier: Apache-2.0
"""URLs of registries, of their mirrors, and of what they redirect to."""

import re
import urllib.parse
from typing import Self

from msgspec import Struct

DEFAULT_PORTS = {"http": 80, "https": 443}
_LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_HOST = re.compile(rf"{_LABEL}(?:\.{_LABEL})*\.?|[0-9a-f.]*:[0-9a-f:.]*")
_HOST_LIMIT = 253
_LOGIN = re.compile(r"^([a-zA-Z][a-zA-Z0-9+.-]*://)?.*@", re.DOTALL)
_LOOPBACK = re.compile(r"(?:.*\.)?localhost|::1|127(?:\.[0-9]{1,3}){3}")


class Url(Struct, frozen=True, kw_only=True):
    """An absolute http or https URL. `target` is its path and query."""

    scheme: str
    host: str
    port: int
    target: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse a URL.

        Raises ValueError for another scheme, a user or password, a host that no resolver would take, and
        for text that is not a URL.
        """
        parts = urllib.parse.urlsplit(text)
        host = parts.hostname or ""
        if parts.scheme not in DEFAULT_PORTS or "@" in parts.netloc or not is_host(host) or parts.port == 0:
            raise ValueError(f"not an http or https URL: {without_login(text)[:200]!r}")
        target = urllib.parse.quote((parts.path or "/"), safe="/%:@!$&'()*+,;=~-._")
        if parts.query:
            target += "?" + urllib.parse.quote(parts.query, safe="/%:@!$&'()*+,;=?~-._")
        port = parts.port or DEFAULT_PORTS[parts.scheme]
        return cls(scheme=parts.scheme, host=host, port=port, target=target)

    @property
    def origin(self) -> tuple[str, str, int]:
        """The scheme, host and port, which must be the same for credentials to be sent along."""
        return self.scheme, self.host, self.port

    @property
    def authority(self) -> str:
        """Host and port."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def absolute(self) -> str:
        """All of the URL, as a proxy needs it in the request line."""
        authority = self.authority
        if self.port == DEFAULT_PORTS[self.scheme]:
            authority = authority.rpartition(":")[0]
        return f"{self.scheme}://{authority}{self.target}"

    def __str__(self) -> str:
        """Return the URL without its query, which may be a credential, as in signed links."""
        return f"{self.scheme}://{self.authority}{self.target.partition('?')[0]}"


def is_host(text: str) -> bool:
    """Tell whether a text has the form of a host name or an IP address, in lower case."""
    return len(text) <= _HOST_LIMIT and _HOST.fullmatch(text) is not None


def is_loopback(host: str) -> bool:
    """Tell whether a host name or address always means this machine."""
    return _LOOPBACK.fullmatch(host) is not None


def without_login(text: str) -> str:
    """Return a URL, or a text that should be one, without its user and password."""
    return _LOGIN.sub(r"\1…@", text, count=1)
