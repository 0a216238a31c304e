# SPDX-License-Identifier: Apache-2.0
"""Upload a blob in several requests, for front ends of registries that limit the size of one.

POST begins an upload, each PATCH sends the next bytes to where the last answer leads, PUT ends it with the
digest (distribution specification 1.1, "Pushing a blob in chunks"). Some registries do not have it.
"""

from collections.abc import Iterator

from msgspec import structs

from oci.registry.blobs import BlobBody
from oci.registry.host import Bytes, Host, target_of
from oci.registry.transport import Answer
from oci.registry.url import Url
from rekindle.digest import Digest
from rekindle.errors import NotFoundError, RegistryError

_ACCEPTED = frozenset({202})
_TAKEN = frozenset({200, 201, 202, 204})  # the specification says 202; go-containerregistry answers 204
_CREATED = frozenset({200, 201, 204})
_ATTEMPTS = 3
_PAUSE_SECONDS = 0.5
_TYPE = {"Content-Type": "application/octet-stream"}


def upload(
    origin: Host, repository: str, scope: str, digest: Digest, body: BlobBody, chunk_bytes: int
) -> str:
    """Upload a blob in chunks; return the digest that the registry says it stored.

    An upload that broke begins anew. Raises IntegrityError for other bytes than those of the digest.
    """
    for left in reversed(range(_ATTEMPTS)):
        try:
            return _attempt(origin, repository, scope, digest, body, chunk_bytes)
        except (RegistryError, NotFoundError):  # the latter if the registry has forgotten the upload
            if not left:
                raise
            origin.pause(_PAUSE_SECONDS)
    raise AssertionError


def _attempt(
    origin: Host, repository: str, scope: str, digest: Digest, body: BlobBody, chunk_bytes: int
) -> str:
    with origin.ask("POST", f"{repository}/blobs/uploads/", scope=scope, expected=_ACCEPTED) as answer:
        place = target_of(answer)
        least = answer.headers.get("OCI-Chunk-Min-Length", "0")
        chunk_bytes = max(chunk_bytes, int(least) if least.isdecimal() else 0)
    rest, begin = _Rest(body.pieces()), 0
    while begin < body.length:
        end = min(begin + chunk_bytes, body.length)
        headers = {**_TYPE, "Content-Range": f"{begin}-{end - 1}"}
        chunk = _Chunk(rest, end - begin)
        with _send(origin, "PATCH", place, scope, headers, chunk, _TAKEN) as answer:
            place, begin = target_of(answer), end
    rest.finish()
    joint = "&" if "?" in place.target else "?"
    last = structs.replace(place, target=f"{place.target}{joint}digest={digest}")
    with _send(origin, "PUT", last, scope, _TYPE, Bytes(b""), _CREATED) as answer:
        return str(answer.headers.get("Docker-Content-Digest", digest))


def _send(
    origin: Host,
    method: str,
    place: Url,
    scope: str,
    headers: dict[str, str],
    body: "Bytes | _Chunk",
    expected: frozenset[int],
) -> Answer:
    return origin.ask(method, place, scope=scope, expected=expected, headers=headers, body=body, attempts=1)


class _Rest:
    """The unsent rest of a stream of pieces."""

    def __init__(self, pieces: Iterator[memoryview]) -> None:
        self._pieces = pieces
        self._piece = memoryview(b"")

    def take(self, at_most: int) -> memoryview:
        """Return the next bytes, valid until the next call."""
        if not self._piece:
            self._piece = next(self._pieces, memoryview(b""))
        piece, self._piece = self._piece[:at_most], self._piece[at_most:]
        return piece

    def finish(self) -> None:
        """Let the stream count and check what was taken last. Raises RegistryError if there is more."""
        if self._piece or next(self._pieces, memoryview(b"")):
            raise RegistryError("a blob has more bytes than its size")


class _Chunk:
    """The next bytes of a blob as the body of a request. They can be read once."""

    is_repeatable = False

    def __init__(self, rest: _Rest, length: int) -> None:
        self.length = length
        self._rest = rest
        self._left = length

    def pieces(self) -> Iterator[memoryview]:
        if self._left < self.length:
            raise RegistryError("a chunk of an upload was sent already, and the registry asks for it again")
        while self._left:
            piece = self._rest.take(self._left)
            if not piece:
                raise RegistryError("a blob ended before its size")
            self._left -= len(piece)
            yield piece
