# SPDX-License-Identifier: Apache-2.0
"""Decide which requests vLLM refuses for want of a key, to enforce a key before a server that has none.

After `AuthenticationMiddleware` in vllm/entrypoints/serve/middleware/authenticate.py of 0.32: a request,
also one to open a WebSocket, whose path begins with one of a few prefixes needs the header `Authorization:
Bearer KEY`, unless its method is OPTIONS. The first such header counts, the scheme in any case; the rest
must be the key exactly.
"""

import hashlib
import hmac
import re
from collections.abc import Sequence
from typing import Self
from urllib.parse import unquote

from msgspec import Struct

from rekindle.node.packages import major_minor

Headers = Sequence[tuple[bytes, bytes]]
"""Names and values as they were received; names in any case, values without white space around them."""

_NEWEST_KNOWN = (0, 32)
# Before 0.32, fewer. The middleware of the first versions also took the host's name for a part of the path.
_PREFIXES = ("/v1", "/v2", "/inference", "/cohere")
# What every version leaves open. Of a version that is not known, nothing else is.
_OPEN = frozenset({"/health", "/ping", "/version", "/load", "/metrics", "/metrics/"})
_AUTHORITY = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^/?#]*")

UNAUTHORIZED_STATUS = 401
UNAUTHORIZED_BODY = b'{"error":"Unauthorized"}'


class Guard(Struct, frozen=True, kw_only=True):
    """The keys of which a request needs one, as digests, and the paths that need one.

    `prefixes` are those of the paths that need a key; empty if all paths but a few need one. `root_path` is
    the prefix below which a proxy shows the server (`--root-path`).
    """

    digests: tuple[bytes, ...]
    prefixes: tuple[str, ...]
    root_path: str = ""

    @classmethod
    def of(cls, keys: Sequence[str], *, version: str, root_path: str = "") -> Self:
        """Return the guard of a server of a version of vLLM. Raises ValueError for a key that is not text."""
        known = (0,) < major_minor(version) <= _NEWEST_KNOWN
        return cls(
            digests=tuple(hashlib.sha256(key.encode()).digest() for key in keys),
            prefixes=_PREFIXES if known else (),
            root_path=root_path,
        )

    def refuses(self, method: bytes, target: bytes, headers: Headers) -> bool:
        """Tell whether a request needs a key and has none."""
        upgrades = any(name.lower() == b"upgrade" for name, _ in headers)
        if method == b"OPTIONS" and not upgrades:  # a WebSocket has no method
            return False
        return self._needs_key(target) and not self._has_key(headers)

    def _needs_key(self, target: bytes) -> bool:
        text = target.decode("latin-1")
        if found := _AUTHORITY.match(text):
            text = text[found.end() :] or "/"
        path = unquote(re.split("[?#]", text, maxsplit=1)[0])
        below = path.removeprefix(self.root_path)
        if self.prefixes:
            return below.startswith(self.prefixes)
        return below not in _OPEN

    def _has_key(self, headers: Headers) -> bool:
        given = next((value for name, value in headers if name.lower() == b"authorization"), b"")
        scheme, _, key = given.decode("latin-1").partition(" ")
        digest = hashlib.sha256(key.encode()).digest()
        found = False
        for each in self.digests:  # all of them: the time must not tell which
            found |= hmac.compare_digest(digest, each)
        return found and scheme.lower() == "bearer"
