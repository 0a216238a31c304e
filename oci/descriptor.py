# SPDX-License-Identifier: Apache-2.0
"""Descriptors (OCI image specification 1.1), and the protocol for reading the blobs that they name."""

import contextlib
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from msgspec import Struct, field

from oci import media_types
from rekindle.digest import Digest
from rekindle.errors import FormatError
from rekindle.fields import JSON, Fields
from rekindle.verified_stream import VerifiedStream

_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
_MANIFESTS_LIMIT = 16


class Descriptor(Struct, frozen=True, kw_only=True):
    """A reference to a blob: its media type, its digest, and its size in bytes."""

    media_type: str
    digest: Digest
    size: int
    annotations: Mapping[str, str] = field(default_factory=dict)
    artifact_type: str = ""
    platform: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_memory(self) -> bool:
        """Whether it names a layer of a dump that holds memory files, and nothing else."""
        return self.annotations.get(media_types.ROLE) == media_types.MEMORY_ROLE

    def to_json(self) -> dict[str, JSON]:
        """Return the descriptor as manifests and indexes contain it."""
        out: dict[str, JSON] = {"mediaType": self.media_type, "digest": self.digest, "size": self.size}
        if self.artifact_type:
            out["artifactType"] = self.artifact_type
        if self.platform:
            out["platform"] = dict(self.platform)
        if self.annotations:
            out["annotations"] = dict(self.annotations)
        return out

    @classmethod
    def from_json(cls, value: object, where: str) -> "Descriptor":
        """Parse a descriptor. Raises FormatError if it is malformed or its digest is not sha256."""
        fields = Fields(value, where)
        try:
            digest = Digest.parse(fields.text("digest"))
        except ValueError as error:
            raise FormatError(f"{where}.digest cannot be used", cause=str(error)) from None
        return cls(
            media_type=fields.text("mediaType"),
            digest=digest,
            size=fields.integer("size"),
            annotations=fields.text_map("annotations", {}),
            artifact_type=fields.text("artifactType", ""),
            platform=_texts_of(fields.json("platform")) if fields.has("platform") else {},
        )


def readable(values: Iterable[JSON]) -> list[Descriptor]:
    """Return the descriptors among the values of a list to which anyone may add; others are left out."""
    found = []
    for value in values:
        with contextlib.suppress(FormatError):
            found.append(Descriptor.from_json(value, "entry"))
    return found


def _texts_of(platform: JSON) -> dict[str, str]:
    """Return the text fields of a platform. Others, such as the list `os.features`, are not used."""
    if not isinstance(platform, dict):
        raise FormatError("the platform of a descriptor is not a JSON object", cause=f"{platform!r:.80}")
    return {name: value for name, value in platform.items() if isinstance(value, str)}


def platform_of(machine: str) -> dict[str, str]:
    """Return the OCI platform of a machine, given the name that `uname -m` prints."""
    return {"architecture": _ARCHITECTURES.get(machine, machine), "os": "linux"}


def manifests_of(index: Fields) -> list[Descriptor]:
    """Return the manifests that the index of a snapshot lists. Raises FormatError."""
    return index.list_of("manifests", Descriptor.from_json, at_most=_MANIFESTS_LIMIT)


def cache_among(manifests: Sequence[Descriptor], index: Digest) -> Descriptor | None:
    """Return the kernel cache among the manifests of an index, or None. Raises FormatError for several."""
    caches = [d for d in manifests if d.annotations.get(media_types.ROLE) == media_types.CACHE_ROLE]
    if len(caches) > 1:
        raise FormatError(f"{index} lists {len(caches)} kernel caches instead of one")
    return caches[0] if caches else None


class BlobSource(Protocol):
    """A place to read whole blobs from."""

    def open_blob(self, descriptor: Descriptor) -> io.RawIOBase:
        """Open a blob as a stream of *unchecked* bytes; see `open_verified`."""


class HeldBlob:
    """The bytes of a blob that was read already. Implements `BlobSource`."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    def open_blob(self, _: Descriptor) -> io.RawIOBase:
        """Return a stream of the bytes."""
        return _Bytes(self._content)


class _Bytes(io.RawIOBase):
    def __init__(self, content: bytes) -> None:
        self._rest = memoryview(content)

    def readable(self) -> bool:
        return True

    def readinto(self, into: object, /) -> int:
        view = memoryview(into)  # type: ignore[arg-type]
        count = min(len(view), len(self._rest))
        view[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count


class Blobs(BlobSource, Protocol):
    """A place to read images from: a layout, or a repository of a registry."""

    def read(self, descriptor: Descriptor, *, limit_bytes: int) -> bytes:
        """Return a small blob, checked against its digest. Raises IntegrityError, FormatError."""

    def referrers(self, digest: Digest, *, artifact_type: str = "") -> list[Descriptor]:
        """Return the manifests listed as referring to this one, such as signatures.

        With an `artifact_type`, only those that may be of that type. The caller must check the `subject` of
        each. Raises FormatError if there are too many, or the list is malformed.
        """

    def cancel(self) -> None:
        """Abort the reads of other threads, where they could take long."""

    def fall_back_to_origin(self) -> bool:
        """Read from the origin alone from now on. Return False if that changes nothing.

        Called after bytes did not match their digest.
        """


def verified(stream: io.RawIOBase, descriptor: Descriptor, *, kind: str = "blob") -> VerifiedStream:
    """Return a blob's bytes as a stream that checks them. `kind` is what errors call it."""
    name = f"{kind} {descriptor.digest}"
    return VerifiedStream(stream, digest=descriptor.digest, size=descriptor.size, name=name)


def open_verified(blobs: BlobSource, descriptor: Descriptor, *, kind: str = "blob") -> VerifiedStream:
    """Open a blob as a stream that checks it while it is read."""
    return verified(blobs.open_blob(descriptor), descriptor, kind=kind)
