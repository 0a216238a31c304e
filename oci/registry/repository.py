# SPDX-License-Identifier: Apache-2.0
"""One repository of a registry: what the distribution specification 1.1 lets clients do with it."""

import threading
import urllib.parse
from collections.abc import Callable, Sequence
from typing import Self

from msgspec import structs

from oci import media_types
from oci.descriptor import BlobSource, Descriptor
from oci.reference import RegistryReference
from oci.registry import referrers
from oci.registry.access import Access, Routes
from oci.registry.blobs import BlobBody, BlobFetcher
from oci.registry.download import BlobStream, Downloads
from oci.registry.host import REDIRECTS, Bytes, Host, target_of
from oci.registry.hosts import Hosts
from oci.registry.retry import RETRYABLE
from oci.registry.settle import Settling
from oci.registry.transport import Answer
from oci.registry.url import Url
from rekindle.digest import Digest
from rekindle.errors import CredentialsError, FormatError, IntegrityError, NotFoundError, RegistryError
from rekindle.fields import Fields

_ACCEPT = ", ".join(sorted(media_types.DOCUMENTS))
_ANY = frozenset(range(100, 600))
_ACCEPTED = frozenset({202})
_CREATED = frozenset({200, 201, 204})
_FORGOTTEN = frozenset({404, 416})  # an upload that a registry no longer knows, after a restart
_SETTLED = _ANY - RETRYABLE  # what another attempt would not change
_THERE = frozenset({200}) | REDIRECTS
_KEPT_BYTES = 64 << 20  # of manifests and other small blobs: they are read more than once
_END_SECONDS = 1.0
_UNKNOWN_ATTEMPTS = 3  # at a manifest of which a blob is not known
_UNKNOWN_SECONDS = 0.2


class Repository:
    """Implements `Blobs` and `Destination`. For many threads; its context ends all that is under way."""

    def __init__(
        self, reference: RegistryReference, access: Access, *, mount_from: Sequence[str] = ()
    ) -> None:
        """`mount_from` are repositories of the same registry that may have what is to be pushed."""
        self.reference = reference
        self._access = access
        self._mount_from = mount_from
        self._limits = access.config.limits
        self._name = reference.repository
        self._pull = f"repository:{self._name}:pull"
        self._push = f"repository:{self._name}:pull,push"
        self._lock = threading.Lock()
        self._kept: dict[Digest, bytes] = {}
        self._kept_bytes = 0
        self._settling = Settling(lambda seconds: self._origin.pause(seconds))
        self._fallback = referrers.FallbackIndexes(
            self._fallback_index,
            lambda content, tag: self.put_manifest(content, media_types.INDEX, tag),
            self.has,
            self.keep,
        )
        self._routes = access.routes(reference)
        self._open(self._routes)

    def _open(self, routes: Routes) -> None:
        access = self._access
        self._has_asked_mirrors = bool(routes.mirrors)
        self._hosts = Hosts(self.reference, routes, access)
        self._fetcher = BlobFetcher(self._hosts, self._name)
        self._downloads = Downloads(
            self._fetcher,
            access.config.transfer,
            tally=access.tally,
            limiter=access.limiter,
        )

    @property
    def _origin(self) -> Host:
        return self._hosts.origin

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()
        self._downloads.join(_END_SECONDS)

    def cancel(self) -> None:
        """End all that is under way, in other threads too."""
        self._downloads.close()
        self._hosts.close()

    def fall_back_to_origin(self) -> bool:
        """See `Blobs.fall_back_to_origin`: from now on, only the origin is asked, if there were mirrors.

        A mirror that is no longer asked may still be where the wrong bytes came from.
        """
        if not self._has_asked_mirrors:
            return False
        self.cancel()
        self._open(Routes(origin=self._routes.origin))
        return True

    # Reading.

    def resolve(self) -> Descriptor:
        """Return the manifest or index of the reference, checked against the digest if it has one.

        A tag is resolved by the origin alone; a digest can be answered by any host. Raises NotFoundError.
        """
        try:
            if self.reference.digest is not None:
                name = str(self.reference.digest)
                return self._hosts.first(lambda host: self._fetch_manifest(host, name))[0]
            return self._fetch_manifest(self._origin, self.reference.tag)[0]
        except NotFoundError as error:
            raise NotFoundError(f"there is no image {self.reference}", cause=error.cause) from None

    def read(self, descriptor: Descriptor, *, limit_bytes: int) -> bytes:
        """See `Blobs.read`. Raises NotFoundError, RegistryError, CredentialsError besides."""
        if descriptor.size > limit_bytes:
            raise FormatError(f"blob {descriptor.digest} is too large: {descriptor.size} bytes")
        if descriptor.digest in self._kept:
            content = self._kept[descriptor.digest]
            if len(content) != descriptor.size:
                raise IntegrityError(f"{descriptor.digest} does not have the size that its descriptor says")
            return content
        return self._hosts.first(lambda host: self._read_from(host, descriptor))

    def open_blob(self, descriptor: Descriptor) -> BlobStream:
        """See `Blobs.open_blob`; the rest is fetched while the stream is read."""
        return self._downloads.open(descriptor)

    def part(self, blob: Descriptor, begin: int, end: int, *, broken: Answer | None = None) -> Answer:
        """Return the answer to a request for a part of a blob, unchecked. See `download.Fetch`."""
        return self._fetcher(blob, begin, end, broken=broken)

    def tags(self) -> list[str]:
        """Return the tags of the repository, as the origin lists them. Raises NotFoundError."""
        from oci.registry import tags

        return tags.listed(self._origin, self._name)

    def tagged(self, tag: str) -> Descriptor | None:
        """Return the manifest under a tag of this repository; None if there is none."""
        try:
            return self._fetch_manifest(self._origin, tag)[0]
        except NotFoundError:
            return None

    def referrers(self, digest: Digest, *, artifact_type: str = "") -> list[Descriptor]:
        """See `Blobs.referrers`.

        Anything but an index means that the registry does not have the API: then the fallback tag counts.
        So it does if the API knows none of a type: the registry may have got it only later. Raises
        RegistryError if it cannot be told, and FormatError if there are too many.
        """
        failure: RegistryError | None = None
        try:
            found = referrers.ask(self._origin, self._name, digest, artifact_type)
            if found or (found is not None and not artifact_type):
                return found
        except CredentialsError:  # some refuse what they do not know; the tag tells
            pass
        except RegistryError as error:
            failure = error
        try:
            fallback, content = self._fetch_manifest(self._origin, referrers.fallback_tag(digest))
        except NotFoundError:
            if failure is not None:  # we do not know that there are none
                raise failure from None
            return []
        if fallback.media_type != media_types.INDEX or fallback.digest == digest:
            return []
        return referrers.listed(content, artifact_type)

    def _fetch_manifest(self, host: Host, name: str) -> tuple[Descriptor, bytes]:
        path = f"{self._name}/manifests/{name}"
        limit = self._limits.manifest_bytes
        accept = {"Accept": _ACCEPT}
        content, headers = host.read(path, scope=self._pull, headers=accept, limit_bytes=limit)
        media_type, said = referrers.media_type_of(headers), headers.get("Docker-Content-Digest", "")
        digest = Digest.of_bytes(content)
        for wanted in (name, said):
            if wanted.startswith("sha256:") and wanted != digest:
                raise IntegrityError(
                    f"{host.name} gives another manifest than {wanted}", cause=f"it is {digest}"
                )
        fields = Fields.parse(content, "the manifest", limit_bytes=limit)
        if fields.text("mediaType", media_type) != media_type:
            raise FormatError(f"{host.name} calls {digest} {media_type}, and it says something else")
        self._keep(digest, content)
        descriptor = Descriptor(
            media_type=media_type,
            digest=digest,
            size=len(content),
            artifact_type=fields.text("artifactType", ""),
        )
        return descriptor, content

    def _read_from(self, host: Host, descriptor: Descriptor) -> bytes:
        is_manifest = descriptor.media_type in media_types.DOCUMENTS
        kind = "manifests" if is_manifest else "blobs"
        headers = {"Accept": descriptor.media_type} if is_manifest else {}
        path = f"{self._name}/{kind}/{descriptor.digest}"
        limit = descriptor.size + 1
        content, _ = host.read(path, scope=self._pull, headers=headers, limit_bytes=limit)
        if len(content) != descriptor.size or Digest.of_bytes(content) != descriptor.digest:
            raise IntegrityError(
                f"{host.name} gives other bytes than those of {descriptor.digest}",
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

    # Writing, to the origin alone.

    def has(self, descriptor: Descriptor) -> bool:
        """See `Destination.has`."""
        kind = "manifests" if descriptor.media_type in media_types.DOCUMENTS else "blobs"
        headers = {"Accept": _ACCEPT} if kind == "manifests" else {}
        path = f"{self._name}/{kind}/{descriptor.digest}"
        # Some do not take HEAD, or refuse it: sending all of it again does no harm.
        with self._origin.ask("HEAD", path, scope=self._push, expected=_SETTLED, headers=headers) as answer:
            length = answer.headers.get("Content-Length", "")
            # A redirect says that there is something to lead to; a size that differs, that it is broken.
            there = answer.status in _THERE
            return there and (answer.status != 200 or not length or length == str(descriptor.size))

    def mount(self, descriptor: Descriptor) -> bool:
        """See `Destination.mount`."""
        return any(self._mount(descriptor, repository) for repository in self._mount_from)

    def _mount(self, descriptor: Descriptor, repository: str) -> bool:
        query = urllib.parse.urlencode({"mount": descriptor.digest, "from": repository}, safe=":/")
        path = f"{self._name}/blobs/uploads/?{query}"
        scope = f"{self._push} repository:{repository}:pull"
        try:
            with self._origin.ask("POST", path, scope=scope, expected=_CREATED | _ACCEPTED) as answer:
                if answer.status == 201:
                    return True
                place = target_of(answer)  # it began an upload instead, which is of no use
            with self._origin.ask("DELETE", place, scope=self._push, expected=_ANY, attempts=1):
                return False
        except (RegistryError, NotFoundError, CredentialsError):
            return False

    def upload(self, descriptor: Descriptor, source: BlobSource) -> None:
        """See `Destination.upload`. Raises IntegrityError for other bytes than those of the digest."""
        body = BlobBody(descriptor, source, self._access)
        chunk_bytes = self._access.config.registry(self.reference.host).chunk_bytes
        if chunk_bytes is not None and descriptor.size > chunk_bytes:
            from oci.registry import chunks  # rarely needed

            said = chunks.upload(self._origin, self._name, self._push, descriptor.digest, body, chunk_bytes)
        else:
            said = self._upload_whole(descriptor, body)
        if said != descriptor.digest:
            raise IntegrityError(f"{self._origin.name} stored {said} for {descriptor.digest}")

    def _upload_whole(self, descriptor: Descriptor, body: BlobBody) -> str:
        """Upload a blob in one request; return the digest that the registry says it stored."""

        def begin() -> Url:
            path = f"{self._name}/blobs/uploads/"
            with self._origin.ask("POST", path, scope=self._push, expected=_ACCEPTED) as answer:
                place = target_of(answer)
            joint = "&" if "?" in place.target else "?"
            return structs.replace(place, target=f"{place.target}{joint}digest={descriptor.digest}")

        with self._origin.ask(
            "PUT",
            begin,  # another URL for each attempt: an upload that broke cannot be continued
            scope=self._push,
            expected=_CREATED,
            headers={"Content-Type": "application/octet-stream"},
            body=body,
            again=RETRYABLE | _FORGOTTEN,
        ) as answer:
            return str(answer.headers.get("Docker-Content-Digest", descriptor.digest))

    def put_manifest(self, content: bytes, media_type: str, name: str | None = None) -> Digest:
        """See `Destination.put_manifest`. Raises FormatError for what is not a manifest."""
        digest = Digest.of_bytes(content)
        if media_type not in media_types.DOCUMENTS:
            raise FormatError(f"{digest} is not a manifest or index", cause=f"{media_type!r:.80}")
        fields = Fields.parse(content, "the manifest", limit_bytes=self._limits.manifest_bytes)
        subject = None
        if fields.has("subject") and fields.json("subject") is not None:
            subject = Descriptor.from_json(fields.json("subject"), "subject").digest
        with self._send_manifest(content, media_type, name or digest) as answer:
            said = answer.headers.get("Docker-Content-Digest", digest)
            listed_for = answer.headers.get("OCI-Subject")
        if said != digest:
            raise IntegrityError(f"{self._origin.name} stored {said} for {digest}")
        if subject is not None and listed_for != subject:
            self._fallback.add(subject, referrers.entry(fields, media_type, digest, len(content)))
        return digest

    def _send_manifest(self, content: bytes, media_type: str, name: str) -> Answer:
        """Send a manifest. Try again if a blob that it lists is not known yet.

        docker-registry 2.8 says so while another client uploads the same blob again, and storage that is
        copied between places soon after an upload.
        """
        for left in reversed(range(_UNKNOWN_ATTEMPTS)):
            try:
                return self._origin.ask(
                    "PUT",
                    f"{self._name}/manifests/{name}",
                    scope=self._push,
                    expected=_CREATED,
                    headers={"Content-Type": media_type},
                    body=Bytes(content),
                )
            except (RegistryError, NotFoundError) as error:
                if not left or "BLOB_UNKNOWN" not in (error.cause or ""):
                    raise
                self._origin.pause(_UNKNOWN_SECONDS)
        raise AssertionError

    def keep(self, tag: str, write_again: Callable[[], bool]) -> None:
        """See `Destination.keep`."""
        self._settling.keep(tag, write_again)

    def settle(self) -> None:
        """See `Destination.settle`."""
        self._settling.settle()

    def _fallback_index(self, tag: str) -> bytes | None:
        """Return the index of referrers under a tag, or None."""
        try:
            there, content = self._fetch_manifest(self._origin, tag)
        except NotFoundError:
            return None
        is_list = there.media_type == media_types.INDEX and referrers.fallback_tag(there.digest) != tag
        return content if is_list else None
