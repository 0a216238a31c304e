# SPDX-License-Identifier: Apache-2.0
"""One repository of a registry: what the distribution specification 1.1 lets one do with it."""

import hashlib
import http.client
import json
import re
import threading
import urllib.parse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Self, TypeVar

from oci import media_types
from oci.descriptor import Blobs, Descriptor
from oci.progress import Limiter, Tally
from oci.reference import RegistryReference
from oci.registry import credentials
from oci.registry.download import BlobStream, Downloads
from oci.registry.endpoint import AGAIN, Bytes, Endpoint, target_of
from oci.registry.transport import PIECE_BYTES, Answer, Connections, Send, Url, is_loopback, without_login
from rekindle.config import Config, RegistrySettings
from rekindle.digest import Digest
from rekindle.errors import (
    CredentialsError,
    FormatError,
    IntegrityError,
    NotFoundError,
    RegistryError,
    RekindleError,
    UsageError,
)
from rekindle.fields import Fields

T = TypeVar("T")

_OK = frozenset({200})
_STREAMED = frozenset({200, 206})
_REDIRECTED = frozenset({200, 206, 301, 302, 303, 307, 308})
_EXPIRED = frozenset({400, 401, 403, 404, 410})  # how storage says that a signed link is too old
_ACCEPT = ", ".join(sorted(media_types.DOCUMENTS))
_ANY = frozenset(range(100, 600))
_ACCEPTED = frozenset({202})
_CREATED = frozenset({200, 201, 204})
_FORGOTTEN = frozenset({404, 416})  # an upload that a registry no longer knows, after a restart
_SETTLED = _ANY - AGAIN  # what another try would not change
_REMEDY = "make the snapshot anew, or fetch it again"
_REFERRERS_LIMIT = 1000
_REFERRERS_BYTES = 4 << 20
_PAGES_LIMIT = 100
_NEXT = re.compile(r'<([^<>]*)>\s*;[^,]*\brel="?next"?')
_LINK_LIMIT = 4096
_RANGE = re.compile(r"bytes +(\d+)-(\d+)/(\d+|\*)", re.ASCII | re.IGNORECASE)
_KEPT_BYTES = 64 << 20  # of manifests and other small blobs: they are read more than once
_STRIKES_LIMIT = 3
_END_SECONDS = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """How registries are reached: the configuration, what one command adds to it, and who counts."""

    config: Config
    tally: Tally
    limiter: Limiter
    mirrors: Sequence[str] = ()
    plain_http: bool | None = None
    find_credentials: Callable[[str], credentials.Credentials | None] = credentials.find

    def settings(self, host: str) -> RegistrySettings:
        """Of one registry."""
        settings = self.config.registry(host)
        if self.plain_http is not None:
            settings = replace(settings, plain_http=self.plain_http)
        return replace(settings, mirrors=(*self.mirrors, *settings.mirrors))


class Repository:
    """Implements `Blobs`. For many threads; the context ends all that is under way."""

    def __init__(
        self, reference: RegistryReference, access: Access, *, mount_from: Sequence[str] = ()
    ) -> None:
        """`mount_from` are repositories of the same registry that may have what is to be pushed."""
        self._mount_from = mount_from
        self.reference = reference
        self._access = access
        self._limits = access.config.limits
        settings = access.settings(reference.host)
        self._base = _base(reference.api_host, settings.plain_http)
        self._open(settings.mirrors)
        self._name = reference.repository
        self._pull = f"repository:{self._name}:pull"
        self._push = f"repository:{self._name}:pull,push"
        self._lock = threading.Lock()
        self._kept: dict[Digest, bytes] = {}
        self._kept_bytes = 0

    def _open(self, mirrors: Sequence[str]) -> None:
        access, host = self._access, self.reference.host
        ca_files = {name: each.ca_file for name, each in access.config.registries.items() if each.ca_file}
        self._connections = Connections(access.config.patience, ca_files=ca_files)
        self._origin = Endpoint(
            self._base,
            self._connections,
            access.find_credentials,
            name=self.reference.api_host,
            login=self.reference.api_host,
        )
        query = urllib.parse.urlencode({"ns": host})  # as containerd asks its mirrors
        self._mirrors = [
            Endpoint(
                _mirror(url),
                self._connections,
                access.find_credentials,
                name=url,
                login=urllib.parse.urlsplit(url).netloc,
                query=query,
                attempts=1,  # the next try is that at the registry itself
            )
            for url in mirrors
        ]
        self._strikes: dict[str, int] = {}
        self._places: dict[tuple[str, Digest], Url] = {}  # where redirects led
        self._downloads = Downloads(
            self._fetch_stretch, access.config.patience, tally=access.tally, limiter=access.limiter
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()
        self._downloads.join(_END_SECONDS)

    def cancel(self) -> None:
        """Ends all that is under way, in other threads too."""
        for endpoint in (*self._mirrors, self._origin):
            endpoint.close()
        self._downloads.close()
        self._connections.close()

    def fall_back_to_origin(self) -> bool:
        """Read from the registry itself from now on, if there were mirrors. See `Blobs`."""
        if not self._mirrors:
            return False
        self.cancel()
        self._open([])
        return True

    # Reading.

    def resolve(self) -> Descriptor:
        """The manifest or index that the reference names, checked against the digest if it has one.

        A tag is asked of the registry itself: only for a digest it does not matter who answers. Raises
        NotFoundError.
        """
        try:
            if self.reference.digest is not None:
                name = str(self.reference.digest)
                return self._first(lambda endpoint: self._fetch_manifest(endpoint, name))[0]
            return self._fetch_manifest(self._origin, self.reference.tag)[0]
        except NotFoundError as error:
            raise NotFoundError(f"there is no image {self.reference}", cause=error.cause) from None

    def read(self, descriptor: Descriptor, *, limit_bytes: int) -> bytes:
        """See `Blobs.read`. Raises NotFoundError, RegistryError, CredentialsError besides."""
        if descriptor.size > limit_bytes:
            raise FormatError(f"blob {descriptor.digest} has {descriptor.size} bytes, more than is sane")
        if descriptor.digest in self._kept:
            content = self._kept[descriptor.digest]
            if len(content) != descriptor.size:
                raise IntegrityError(f"{descriptor.digest} has not the size that its descriptor says")
            return content
        return self._first(lambda endpoint: self._read_from(endpoint, descriptor))

    def open_blob(self, descriptor: Descriptor) -> BlobStream:
        """See `Blobs.open_blob`; the rest is being fetched while the stream is read."""
        return self._downloads.open(descriptor)

    def tagged(self, tag: str) -> Descriptor | None:
        """The manifest under a tag of this repository; None if there is none."""
        try:
            return self._fetch_manifest(self._origin, tag)[0]
        except NotFoundError:
            return None

    def referrers(self, digest: Digest) -> list[Descriptor]:
        """The manifests that say that they refer to this one; each one's own subject is still to be checked.

        Anything but an index means that the registry has no such interface: then the fallback tag counts.
        Raises RegistryError if it cannot be told, and FormatError if there are more than is sane.
        """
        failure: RegistryError | None = None
        try:
            found = self._ask_referrers(digest)
            if found is not None:
                return found
        except CredentialsError:  # some refuse what they do not know: the tag will tell
            pass
        except RegistryError as error:
            failure = error
        try:
            fallback, content = self._fetch_manifest(self._origin, _fallback_tag(digest))
        except NotFoundError:
            if failure is not None:  # that nothing was found would be a lie
                raise failure from None
            return []
        if fallback.media_type != media_types.INDEX or fallback.digest == digest:
            return []
        return _listed(content)

    def _ask_referrers(self, digest: Digest) -> list[Descriptor] | None:
        """What the interface for referrers says, page after page; None if there is none."""
        where: str | Url = f"{self._name}/referrers/{digest}"
        found: list[Descriptor] = []
        for _ in range(_PAGES_LIMIT):
            with self._origin.ask("GET", where, scope=self._pull, expected=_SETTLED, attempts=2) as answer:
                if answer.status != 200 or _media_type(answer.headers) != media_types.INDEX:
                    return None
                try:
                    found += _listed(answer.read(_REFERRERS_BYTES))
                except OSError as error:
                    raise RegistryError(f"{self._origin.name} fails", cause=str(error)) from None
                if len(found) > _REFERRERS_LIMIT:
                    break
                more = _NEXT.search(answer.headers.get("Link", "")[:_LINK_LIMIT])
                if more is None:
                    return found
                where = target_of(answer, more[1])
        raise FormatError(f"{digest} has more than {_REFERRERS_LIMIT} referrers")

    def _first(self, read: Callable[[Endpoint], T]) -> T:
        """What the first endpoint gives that has it; the registry itself has the last word."""
        for endpoint in list(self._mirrors):
            try:
                return read(endpoint)
            except RekindleError as error:
                self._note(endpoint, error)
        return read(self._origin)

    def _note(self, mirror: Endpoint, error: RekindleError) -> None:
        """A mirror need not have everything; but one that cannot be reached is not asked again. Raises the
        error again if the user is to mend it."""
        if isinstance(error, UsageError):
            raise error
        if not isinstance(error, NotFoundError):
            self._drop(mirror)

    def _strike(self, mirror: object) -> None:
        """Connections break now and then; those of a mirror that does no better are not waited for."""
        if isinstance(mirror, Endpoint) and mirror is not self._origin:
            with self._lock:
                self._strikes[mirror.name] = self._strikes.get(mirror.name, 0) + 1
            if self._strikes[mirror.name] >= _STRIKES_LIMIT:
                self._drop(mirror)

    def _drop(self, mirror: Endpoint) -> None:
        with self._lock:
            self._mirrors = [each for each in self._mirrors if each is not mirror]

    def _fetch_manifest(self, endpoint: Endpoint, name: str) -> tuple[Descriptor, bytes]:
        path = f"{self._name}/manifests/{name}"
        limit = self._limits.manifest_bytes
        content, headers = self._get(endpoint, path, {"Accept": _ACCEPT}, limit)
        media_type, said = _media_type(headers), headers.get("Docker-Content-Digest", "")
        digest = Digest.of_bytes(content)
        for wanted in (name, said):
            if wanted.startswith("sha256:") and wanted != digest:
                raise IntegrityError(
                    f"{endpoint.name} gives another manifest than {wanted}", cause=f"it is {digest}"
                )
        fields = Fields.parse(content, "the manifest", limit_bytes=limit)
        if fields.text("mediaType", media_type) != media_type:
            raise FormatError(f"{endpoint.name} calls {digest} {media_type}, and it says something else")
        self._keep(digest, content)
        descriptor = Descriptor(
            media_type=media_type,
            digest=digest,
            size=len(content),
            artifact_type=fields.text("artifactType", ""),
        )
        return descriptor, content

    def _read_from(self, endpoint: Endpoint, descriptor: Descriptor) -> bytes:
        is_manifest = descriptor.media_type in media_types.DOCUMENTS
        kind = "manifests" if is_manifest else "blobs"
        headers = {"Accept": descriptor.media_type} if is_manifest else {}
        path = f"{self._name}/{kind}/{descriptor.digest}"
        content, _ = self._get(endpoint, path, headers, descriptor.size + 1)
        if len(content) != descriptor.size or Digest.of_bytes(content) != descriptor.digest:
            raise IntegrityError(
                f"{endpoint.name} gives other bytes than those of {descriptor.digest}",
                cause=f"{len(content)} for {descriptor.size} bytes, with {Digest.of_bytes(content)}",
            )
        if not is_manifest:
            self._access.tally.fetch(len(content))
        self._keep(descriptor.digest, content)
        return content

    def _keep(self, digest: Digest, content: bytes) -> None:
        with self._lock:
            if digest not in self._kept and self._kept_bytes + len(content) <= _KEPT_BYTES:
                self._kept[digest] = content
                self._kept_bytes += len(content)

    def _get(
        self, endpoint: Endpoint, path: str, headers: dict[str, str], limit_bytes: int
    ) -> tuple[bytes, http.client.HTTPMessage]:
        """Something small, from the end of all redirects; what breaks midway is asked for anew."""
        for attempt in range(1, endpoint.attempts + 1):
            first = endpoint.ask("GET", path, scope=self._pull, expected=_REDIRECTED, headers=headers)
            try:
                with endpoint.follow(first, scope=self._pull, expected=_OK, headers=headers) as answer:
                    return answer.read(limit_bytes), answer.headers
            except OSError as error:
                if attempt == endpoint.attempts:
                    raise RegistryError(f"{endpoint.name} fails", cause=str(error)) from None
                endpoint.pause(attempt)
        raise AssertionError("not reached")

    def _fetch_stretch(self, blob: Descriptor, begin: int, end: int, *, broken: Answer | None) -> Answer:
        """See `download.Fetch`. What a mirror began and did not finish, the registry itself is asked for."""
        if broken is not None:
            self._strike(broken.giver)
        for endpoint in [] if broken is not None else self._mirrors:
            try:
                return self._fetch_from(endpoint, blob, begin, end)
            except RekindleError as error:
                self._note(endpoint, error)
            except OSError:
                self._strike(endpoint)
        return self._fetch_from(self._origin, blob, begin, end)

    def _fetch_from(self, endpoint: Endpoint, blob: Descriptor, begin: int, end: int) -> Answer:
        headers = {} if (begin, end) == (0, blob.size) else {"Range": f"bytes={begin}-{end - 1}"}
        key = endpoint.name, blob.digest
        if place := self._places.get(key):
            answer = self._connections.request("GET", place, headers)
            if answer.status in _STREAMED:
                return _checked(answer, endpoint, blob, begin, end)
            answer.close()
            self._places.pop(key, None)
            if answer.status not in _EXPIRED:
                raise ConnectionError(f"{place} answers {answer.status}")
        path = f"{self._name}/blobs/{blob.digest}"
        first = endpoint.ask("GET", path, scope=self._pull, expected=_REDIRECTED, headers=headers)
        answer = endpoint.follow(first, scope=self._pull, expected=_STREAMED, headers=headers)
        if answer.url.origin != first.url.origin:  # there, nobody asks who we are
            self._places[key] = answer.url
        return _checked(answer, endpoint, blob, begin, end)

    # Writing. Only ever to the registry itself.

    def has(self, descriptor: Descriptor) -> bool:
        """Whether a blob or manifest is there already."""
        kind = "manifests" if descriptor.media_type in media_types.DOCUMENTS else "blobs"
        headers = {"Accept": _ACCEPT} if kind == "manifests" else {}
        path = f"{self._name}/{kind}/{descriptor.digest}"
        # Some do not take HEAD, or refuse it: sending all of it again does no harm.
        with self._origin.ask("HEAD", path, scope=self._push, expected=_SETTLED, headers=headers) as answer:
            length = answer.headers.get("Content-Length", "")
            # A redirect says that there is something to lead to; a size that differs, that it is broken.
            there = answer.status in _REDIRECTED
            return there and (answer.status != 200 or not length or length == str(descriptor.size))

    def mount(self, descriptor: Descriptor) -> bool:
        """See `Target.mount`."""
        return any(self._mount(descriptor, repository) for repository in self._mount_from)

    def _mount(self, descriptor: Descriptor, repository: str) -> bool:
        query = urllib.parse.urlencode({"mount": descriptor.digest, "from": repository}, safe=":/")
        path = f"{self._name}/blobs/uploads/?{query}"
        scope = f"{self._push} repository:{repository}:pull"
        try:
            with self._origin.ask("POST", path, scope=scope, expected=_CREATED | _ACCEPTED) as answer:
                if answer.status == 201:
                    return True
                place = target_of(answer)  # it began an upload instead, which nobody needs
            with self._origin.ask("DELETE", place, scope=self._push, expected=_ANY, attempts=1):
                return False
        except (RegistryError, NotFoundError, CredentialsError):
            return False

    def upload(self, descriptor: Descriptor, source: Blobs) -> None:
        """Sends a blob, in one stream. Nothing of it is there until all of it is.

        Raises IntegrityError if the source gives other bytes than those of the digest.
        """

        def begin() -> Url:
            path = f"{self._name}/blobs/uploads/"
            with self._origin.ask("POST", path, scope=self._push, expected=_ACCEPTED) as answer:
                place = target_of(answer)
            joint = "&" if "?" in place.target else "?"
            return replace(place, target=f"{place.target}{joint}digest={descriptor.digest}")

        with self._origin.ask(
            "PUT",
            begin,  # an upload that broke is begun anew
            scope=self._push,
            expected=_CREATED,
            headers={"Content-Type": "application/octet-stream"},
            body=_BlobBody(descriptor, source, self._access),
            again=AGAIN | _FORGOTTEN,
        ) as answer:
            said = answer.headers.get("Docker-Content-Digest", descriptor.digest)
        if said != descriptor.digest:
            raise IntegrityError(f"{self._origin.name} stored {said} for {descriptor.digest}")

    def put_manifest(self, content: bytes, media_type: str, name: str | None = None) -> Digest:
        """Stores a manifest under its digest, or under a tag. What it names must be there.

        Raises FormatError for what is no manifest.
        """
        digest = Digest.of_bytes(content)
        if media_type not in media_types.DOCUMENTS:
            raise FormatError(f"{digest} is no manifest or index", cause=f"{media_type!r:.80}")
        fields = Fields.parse(content, "the manifest", limit_bytes=self._limits.manifest_bytes)
        with self._origin.ask(
            "PUT",
            f"{self._name}/manifests/{name or digest}",
            scope=self._push,
            expected=_CREATED,
            headers={"Content-Type": media_type},
            body=Bytes(content),
        ) as answer:
            said = answer.headers.get("Docker-Content-Digest", digest)
            knows_referrers = "OCI-Subject" in answer.headers
        if said != digest:
            raise IntegrityError(f"{self._origin.name} stored {said} for {digest}")
        if fields.has("subject") and fields.json("subject") is not None and not knows_referrers:
            self._list_referrer(content, media_type, digest)
        return digest

    def _list_referrer(self, content: bytes, media_type: str, digest: Digest) -> None:
        """Adds a manifest to the fallback tag of its subject, as the specification asks of clients."""
        fields = Fields.parse(content, "the manifest", limit_bytes=self._limits.manifest_bytes)
        subject = Descriptor.from_json(fields.json("subject"), "subject")
        artifact_type = fields.text("artifactType", "")
        if not artifact_type and fields.has("config"):
            artifact_type = fields.inner("config").text("mediaType", "")
        ours = Descriptor(
            media_type=media_type,
            digest=digest,
            size=len(content),
            artifact_type=artifact_type,
            annotations=fields.text_map("annotations", {}),
        )
        tag = _fallback_tag(subject.digest)
        try:
            there, listed = self._fetch_manifest(self._origin, tag)
            others = _listed(listed) if there.media_type == media_types.INDEX else []
        except NotFoundError:
            others = []
        entries = [*(each for each in others if each.digest != digest), ours]
        index = {
            "schemaVersion": 2,
            "mediaType": media_types.INDEX,
            "manifests": [each.to_json() for each in entries],
        }
        self.put_manifest(json.dumps(index).encode(), media_types.INDEX, tag)


class _BlobBody:
    """A blob as the body of a request, hashed as it goes."""

    def __init__(self, descriptor: Descriptor, source: Blobs, access: Access) -> None:
        self._descriptor = descriptor
        self._source = source
        self._access = access

    @property
    def length(self) -> int:
        return self._descriptor.size

    @property
    def is_repeatable(self) -> bool:
        return False

    def send(self, send: Send) -> None:
        hasher = hashlib.sha256()
        piece_bytes = self._access.limiter.piece_bytes(PIECE_BYTES)
        buffer = memoryview(bytearray(piece_bytes))
        left = self._descriptor.size
        with self._source.open_blob(self._descriptor) as stream:
            while left:
                count = stream.readinto(buffer[: min(left, piece_bytes)])
                if not count:
                    raise IntegrityError(f"blob {self._descriptor.digest} is cut off", hint=_REMEDY)
                hasher.update(buffer[:count])
                left -= count
                # The registry must not get the last bytes of what is not what it should be.
                if not left and "sha256:" + hasher.hexdigest() != self._descriptor.digest:
                    raise IntegrityError(
                        f"the bytes of blob {self._descriptor.digest} are not those of its digest",
                        hint=_REMEDY,
                    )
                self._access.limiter.wait(count)
                send(buffer[:count])
                self._access.tally.send(count)


def _checked(answer: Answer, endpoint: Endpoint, blob: Descriptor, begin: int, end: int) -> Answer:
    """The answer, if it is the one to the question. Raises RegistryError for another."""
    answer.giver = endpoint
    problem = _problem(answer.status, answer.headers, answer.length, begin, end, blob.size)
    if problem:
        answer.close()
        raise RegistryError(f"blob {blob.digest} cannot be fetched", cause=f"{answer.url}: {problem}")
    return answer


def _problem(
    status: int, headers: http.client.HTTPMessage, length: int | None, begin: int, end: int, size: int
) -> str:
    """What is wrong with an answer to the question for a part of so many bytes; "" if nothing is."""
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


def _listed(content: bytes) -> list[Descriptor]:
    fields = Fields.parse(content, "the list of referrers", limit_bytes=_REFERRERS_BYTES)
    return fields.list_of("manifests", Descriptor.from_json, at_most=_REFERRERS_LIMIT)


def _fallback_tag(digest: Digest) -> str:
    return f"sha256-{digest.hex}"


def _media_type(headers: http.client.HTTPMessage) -> str:
    return headers.get("Content-Type", "").partition(";")[0].strip().lower()


def _base(host: str, plain_http: bool | None) -> Url:
    try:
        url = Url.parse(f"https://{host}/")
        plain = is_loopback(url.host) if plain_http is None else plain_http
        return Url.parse(f"{'http' if plain else 'https'}://{host}/")
    except ValueError as error:
        raise UsageError(f"{host} is no registry", cause=str(error)) from None


def _mirror(url: str) -> Url:
    try:
        if "?" in url or "#" in url:
            raise ValueError("it has more than a path")
        return Url.parse(url)
    except ValueError as error:
        # What the parser says of a URL may be a part of the password.
        cause = "it must not hold a user or a password" if "@" in url else str(error)
        raise UsageError(
            f"{without_login(url)} is no mirror", cause=cause, hint="write http://HOST:PORT or https://HOST"
        ) from None
