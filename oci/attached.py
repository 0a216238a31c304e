# SPDX-License-Identifier: Apache-2.0
"""Find what is attached to an image, such as signatures, and copy it with the image.

An attachment is a manifest whose `subject` is a manifest of the image. Signatures in the form of cosign
before 2.6 are an image under a tag that is made of the digest of what they sign.

Anyone may attach anything, so what is attached cannot break the copying of an image, and is bounded:
signatures are looked at first. What is not copied is told, with the reason.
"""

import contextlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence

from msgspec import Struct, structs

from oci import media_types
from oci.descriptor import Blobs, Descriptor, readable
from oci.destination import Destination, Node
from oci.progress import Tally
from rekindle.config import Limits
from rekindle.digest import Digest
from rekindle.errors import (
    CredentialsError,
    FormatError,
    IntegrityError,
    NotFoundError,
    RegistryError,
    RekindleError,
)
from rekindle.fields import JSON, Fields
from rekindle.report import AttachmentResult

LIMIT = 200  # how many attachments of an image are copied
_LISTED_LIMIT = 5000
_BYTES_LIMIT = 64 << 20  # of their manifests together
_SIMPLE_LIMIT = 100  # older signatures of one image
_WRITES_LIMIT = 10

Tagged = Callable[[str], Descriptor | None]
"""Finds the manifest under a tag, beside the image."""


class Attachment(Struct, frozen=True, kw_only=True):
    """A small manifest that refers to a manifest of an image, and its blobs. `tag` is where it is found."""

    node: Node
    blobs: Sequence[Descriptor]
    subject: Digest
    artifact_type: str = ""
    is_signature: bool = False
    tag: str = ""


def simple_tag(digest: Digest) -> str:
    """Return the tag under which cosign before 2.6 looks for the signatures of an image."""
    return f"sha256-{digest.hex}.sig"


# Finding.


def find(
    source: Blobs,
    image: Sequence[Digest],
    sizes: Mapping[Digest, int],
    limits: Limits,
    tagged: Tagged | None = None,
) -> tuple[list[Attachment], list[AttachmentResult]]:
    """Return the valid attachments of an image's manifests, and the others with what is wrong with them.

    `sizes` are those of the blobs of the image. Raises RegistryError if it cannot be told what is attached.
    """
    found: list[Attachment] = []
    left_out: list[AttachmentResult] = []
    seen = set(image)
    bytes_left = _BYTES_LIMIT
    for each, subject in sorted(_listed(source, image, tagged, left_out), key=_rank):
        if each.digest in seen or each.annotations.get(media_types.SIGNER) == media_types.MACHINE:
            continue
        seen.add(each.digest)
        try:
            if len(found) == LIMIT:
                raise FormatError(f"more than {LIMIT} attachments are not copied")
            if (bytes_left := bytes_left - each.size) < 0:
                raise FormatError(f"more than {_BYTES_LIMIT} bytes of manifests are not copied")
            found.append(_attachment(source, each, subject, sizes, limits))
        except (FormatError, IntegrityError, NotFoundError) as error:
            left_out.append(_failed(each, subject, error))
    return found, left_out


def _listed(
    source: Blobs, image: Sequence[Digest], tagged: Tagged | None, left_out: list[AttachmentResult]
) -> Iterator[tuple[Descriptor, Digest]]:
    """Yield what is listed as attached to the manifests of an image, not checked."""
    count = 0
    for digest in image:
        listed: Sequence[Descriptor] = ()
        try:
            listed = source.referrers(digest)
        except FormatError as error:  # as for too many: then the signatures alone
            left_out.append(AttachmentResult(digest="", subject=digest, problem=error.summary))
            with contextlib.suppress(FormatError):
                listed = source.referrers(digest, artifact_type=media_types.BUNDLE)
        count += len(listed)
        if count > _LISTED_LIMIT:
            problem = f"more than {_LISTED_LIMIT} attachments are not looked at"
            left_out.append(AttachmentResult(digest="", subject=digest, problem=problem))
            return
        yield from ((each, digest) for each in listed)
        if tagged is None:
            continue
        tag = simple_tag(digest)
        try:
            there = tagged(tag)
        except CredentialsError:  # some refuse what they do not know
            there = None
        except (FormatError, IntegrityError) as error:
            left_out.append(AttachmentResult(digest="", subject=digest, problem=error.summary))
            there = None
        if there is not None:
            annotations = {**there.annotations, media_types.SIMPLE_TAG: tag}
            yield structs.replace(there, annotations=annotations), digest


def _rank(listed: tuple[Descriptor, Digest]) -> int:
    each = listed[0]
    if each.artifact_type == media_types.BUNDLE or media_types.SIMPLE_TAG in each.annotations:
        return 0
    return 1 if each.artifact_type in {"", media_types.EMPTY} else 2


def _attachment(
    source: Blobs, descriptor: Descriptor, subject: Digest, sizes: Mapping[Digest, int], limits: Limits
) -> Attachment:
    """Read an attachment. Its manifest must be small and refer to `subject`: the list of referrers may lie.

    Raises FormatError, IntegrityError, NotFoundError.
    """
    content = source.read(descriptor, limit_bytes=limits.manifest_bytes)
    fields = Fields.parse(content, "manifest", limit_bytes=limits.manifest_bytes)
    tag = descriptor.annotations.get(media_types.SIMPLE_TAG, "")
    if not tag and (not fields.has("subject") or fields.inner("subject").text("digest") != subject):
        raise FormatError(f"{descriptor.digest} does not refer to {subject}")
    blobs: dict[Digest, Descriptor] = {}
    for child in children(fields, limits):
        if child.media_type in media_types.DOCUMENTS:
            raise FormatError(f"the attachment {descriptor.digest} lists manifests")
        expected = blobs.setdefault(child.digest, child).size
        if {expected, sizes.get(child.digest, expected)} != {child.size}:
            raise FormatError(f"{descriptor.digest} lists {child.digest} with another size")
    if sum(blob.size for blob in blobs.values()) > limits.record_bytes:
        raise FormatError(f"the attachment {descriptor.digest} is larger than {limits.record_bytes} bytes")
    config = fields.inner("config").text("mediaType", "") if fields.has("config") else ""
    types = {blob.media_type for blob in blobs.values()}
    return Attachment(
        node=Node(descriptor=descriptor, content=content),
        blobs=tuple(blobs.values()),
        subject=subject,
        artifact_type=fields.text("artifactType", "") or config,
        is_signature=bool(types & {media_types.BUNDLE, media_types.SIMPLE_SIGNATURE}),
        tag=tag,
    )


def children(fields: Fields, limits: Limits) -> Iterator[Descriptor]:
    """Yield what a manifest or index lists. Raises FormatError."""
    if fields.has("manifests"):
        yield from fields.list_of("manifests", Descriptor.from_json, at_most=limits.layers)
    if fields.has("config"):
        yield Descriptor.from_json(fields.json("config"), "manifest.config")
    if fields.has("layers"):
        yield from fields.list_of("layers", Descriptor.from_json, at_most=limits.layers)


# Copying.


class _Held:
    """The bytes of a blob that was read already. Implements `BlobSource`."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    def open_blob(self, _: Descriptor) -> io.RawIOBase:
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


class _UnreadableError(Exception):
    """A blob cannot be read from its source; `error` says why."""

    def __init__(self, error: RekindleError) -> None:
        super().__init__(error.message)
        self.error = error


def copy(
    each: Attachment,
    source: Blobs,
    target: Destination,
    *,
    done: set[Digest],
    tally: Tally,
    hint: str = "",
) -> AttachmentResult:
    """Copy an attachment, and return the result. Blobs in `done` are in the target already.

    Raises RegistryError or CredentialsError if the target does not take a signature: else nobody would miss
    it before the image is verified.
    """
    name = each.node.descriptor
    try:
        for blob in {blob.digest: blob for blob in each.blobs}.values():
            if blob.digest not in done:
                _copy_blob(blob, source, target, tally)
                done.add(blob.digest)
        if each.tag:
            put_simple(target, each.tag, simple_layers(each.node.content))
        else:
            # Also if it is there: an attempt that was interrupted may have left it unlisted.
            target.put_manifest(each.node.content, name.media_type)
    except _UnreadableError as unreadable:
        return _failed(name, each.subject, unreadable.error, each.artifact_type)
    except RekindleError as error:
        if each.is_signature:
            raise _refused(each, error, hint) from error
        return _failed(name, each.subject, error, each.artifact_type)
    return AttachmentResult(digest=name.digest, subject=each.subject, artifact_type=each.artifact_type)


def _copy_blob(blob: Descriptor, source: Blobs, target: Destination, tally: Tally) -> None:
    if target.has(blob) or target.mount(blob):
        tally.reuse(blob.size)
        return
    try:
        held = _Held(source.read(blob, limit_bytes=blob.size))
    except (FormatError, IntegrityError, NotFoundError) as error:
        raise _UnreadableError(error) from None
    target.upload(blob, held)


def _refused(each: Attachment, error: RekindleError, hint: str) -> RekindleError:
    kind = CredentialsError if isinstance(error, CredentialsError) else RegistryError
    return kind(
        f"the target does not take the signature {each.node.descriptor.digest} of {each.subject}",
        cause=error.summary,
        hint=hint,
    )


def _failed(
    descriptor: Descriptor, subject: Digest, error: RekindleError, artifact_type: str = ""
) -> AttachmentResult:
    return AttachmentResult(
        digest=descriptor.digest,
        subject=subject,
        artifact_type=artifact_type or descriptor.artifact_type,
        problem=error.summary,
    )


# Older signatures.


def simple_layers(content: bytes) -> list[JSON]:
    """Return the older signatures in an image as its manifest lists them. Raises FormatError."""
    fields = Fields.parse(content, "manifest", limit_bytes=len(content))
    return fields.list_of("layers", lambda value, _: value, at_most=_SIMPLE_LIMIT)


def put_simple(target: Destination, tag: str, layers: Sequence[JSON]) -> None:
    """Add older signatures, whose blobs are in the target, to those under a tag there.

    Others may add theirs at the same time, so the tag is read again after it was written. Raises
    RegistryError if they do not stay, FormatError if something else is under the tag.
    """
    for _ in range(_WRITES_LIMIT):
        there = target.tagged(tag)
        known: list[JSON] = []
        if there is not None:
            known = simple_layers(target.read(there, limit_bytes=there.size))
        marks = {_mark(layer) for layer in known}
        missing = [layer for layer in layers if _mark(layer) not in marks]
        if not missing:
            return
        config, manifest = _simple_image([*known, *missing])
        described = Descriptor(
            media_type=media_types.IMAGE_CONFIG, digest=Digest.of_bytes(config), size=len(config)
        )
        target.upload(described, _Held(config))
        target.put_manifest(manifest, media_types.MANIFEST, tag)
    raise RegistryError(f"the signatures under {tag} do not stay", cause="other clients replace them")


def _mark(layer: JSON) -> tuple[object, object]:
    """Return what tells one older signature from another."""
    annotations = layer.get("annotations") if isinstance(layer, dict) else None
    signature = annotations.get(media_types.SIGNATURE_ANNOTATION) if isinstance(annotations, dict) else None
    return (layer.get("digest") if isinstance(layer, dict) else None), signature


def _simple_image(layers: Sequence[JSON]) -> tuple[bytes, bytes]:
    """Return the config and the manifest of an image of older signatures."""
    digests = [each.digest for each in readable(layers)]
    config = json.dumps(
        {
            "architecture": "",
            "os": "",
            "config": {},
            "rootfs": {"type": "layers", "diff_ids": digests},
        }
    ).encode()
    manifest = {
        "schemaVersion": 2,
        "mediaType": media_types.MANIFEST,
        "config": {
            "mediaType": media_types.IMAGE_CONFIG,
            "digest": Digest.of_bytes(config),
            "size": len(config),
        },
        "layers": list(layers),
    }
    return config, json.dumps(manifest).encode()
