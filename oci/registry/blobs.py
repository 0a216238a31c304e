# SPDX-License-Identifier: Apache-2.0
"""Requests for parts of blobs, and blobs as the bodies of requests."""

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from oci.descriptor import BlobSource, Descriptor, open_verified
from oci.registry.access import Access
from oci.registry.host import REDIRECTS, Host
from oci.registry.hosts import Hosts
from oci.registry.transport import PIECE_BYTES, Answer
from oci.registry.url import Url
from rekindle.digest import Digest
from rekindle.errors import RegistryError, RekindleError

if TYPE_CHECKING:
    from http.client import HTTPMessage

_STREAMED = frozenset({200, 206})
_EXPIRED = frozenset({400, 401, 403, 404, 410})  # how storage says that a signed link is too old
_RANGE = re.compile(r"bytes +(\d+)-(\d+)/(\d+|\*)", re.ASCII | re.IGNORECASE)


class BlobFetcher:
    """Asks for parts of the blobs of one repository. Implements `download.Fetch`; for many threads."""

    def __init__(self, hosts: Hosts, repository: str) -> None:
        self._hosts = hosts
        self._repository = repository
        self._scope = f"repository:{repository}:pull"
        self._places: dict[tuple[str, Digest], Url] = {}  # where redirects led

    def __call__(self, blob: Descriptor, begin: int, end: int, *, broken: Answer | None) -> Answer:
        """See `download.Fetch`. After a broken answer, only the origin is asked."""
        if broken is not None:
            self._hosts.strike(broken.giver)
        for host in [] if broken is not None else self._hosts.mirrors:
            try:
                return self._fetch(host, blob, begin, end)
            except RekindleError as error:
                self._hosts.note(host, error)
            except OSError:
                self._hosts.strike(host)
        return self._fetch(self._hosts.origin, blob, begin, end)

    def _fetch(self, host: Host, blob: Descriptor, begin: int, end: int) -> Answer:
        headers = {} if (begin, end) == (0, blob.size) else {"Range": f"bytes={begin}-{end - 1}"}
        key = host.name, blob.digest
        if place := self._places.get(key):
            answer = self._hosts.connections.request("GET", place, headers)
            if answer.status in _STREAMED:
                return _checked(answer, host, blob, begin, end)
            answer.close()
            self._places.pop(key, None)
            if answer.status not in _EXPIRED:
                raise ConnectionError(f"{place} answers {answer.status}")
        path = f"{self._repository}/blobs/{blob.digest}"
        expected = _STREAMED | REDIRECTS
        first = host.ask("GET", path, scope=self._scope, expected=expected, headers=headers)
        answer = host.follow(first, scope=self._scope, expected=_STREAMED, headers=headers)
        if answer.url.origin != first.url.origin:  # no credentials are needed there
            self._places[key] = answer.url
        return _checked(answer, host, blob, begin, end)


class BlobBody:
    """A blob as the body of a request.

    Its last bytes are sent only if all of them match the digest, so the registry never gets all of a wrong
    blob. `pieces` raises IntegrityError.
    """

    def __init__(self, descriptor: Descriptor, source: BlobSource, access: Access) -> None:
        self._descriptor = descriptor
        self._source = source
        self._access = access

    @property
    def length(self) -> int:
        return self._descriptor.size

    @property
    def is_repeatable(self) -> bool:
        return False

    def pieces(self) -> Iterator[memoryview]:
        buffer = memoryview(bytearray(self._access.limiter.piece_bytes(PIECE_BYTES)))
        with open_verified(self._source, self._descriptor) as stream:
            while count := stream.readinto(buffer):
                self._access.limiter.wait(count)
                yield buffer[:count]
                self._access.tally.send(count)


def _checked(answer: Answer, host: Host, blob: Descriptor, begin: int, end: int) -> Answer:
    """Return the answer if it is the one to the question. Raises RegistryError for another."""
    answer.giver = host
    problem = problem_of(answer.status, answer.headers, answer.length, begin, end, blob.size)
    if problem:
        answer.close()
        raise RegistryError(f"blob {blob.digest} cannot be fetched", cause=f"{answer.url}: {problem}")
    return answer


def problem_of(
    status: int, headers: "HTTPMessage", length: int | None, begin: int, end: int, size: int
) -> str:
    """Return what is wrong with an answer to the question for a part of so many bytes, or ""."""
    encoding, content_range = headers.get("Content-Encoding", "identity"), headers.get("Content-Range", "")
    whole = _RANGE.fullmatch(content_range.strip())
    if encoding.lower() not in {"", "identity"}:
        return f"the content is encoded as {encoding:.40}"
    if status == 200:
        return "" if length in {None, size} else f"it has {length} bytes and should have {size}"
    if (
        whole is None
        or (whole[1], whole[2]) != (str(begin), str(end - 1))
        or whole[3] not in {str(size), "*"}
    ):
        return f"asked for bytes {begin} to {end - 1} of {size}, it sends {content_range[:80]!r}"
    return "" if length in {None, end - begin} else f"asked for {end - begin} bytes, it sends {length}"
