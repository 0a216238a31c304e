# SPDX-License-Identifier: Apache-2.0
"""Find what is attached to an image, such as signatures, and copy it with the image.

An attachment is a manifest whose `subject` is a manifest of the image, or an image under one of cosign's tags
(`cosign_tags`). Attachments may have attachments of their own, as a report that is signed.

Anyone may attach anything, so what is attached cannot break the copying of an image, and is bounded:
signatures are looked at first. What is not copied is told, with the reason.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

from msgspec import Struct, structs

from oci import cosign_tags, media_types, parallel
from oci.descriptor import Blobs, Descriptor, HeldBlob
from oci.destination import Destination, Node
from oci.likelihood import LIMIT, likelihood
from oci.listing import key_of
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
from rekindle.fields import Fields
from rekindle.report import AttachmentResult

_LISTED_LIMIT = 10_000
_BYTES_LIMIT = 64 << 20  # of their manifests together
_DEPTH_LIMIT = 4  # of attachments of attachments
_ASKED_LIMIT = 200  # attachments that are asked for attachments of their own

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


# Finding.


def find(
    source: Blobs,
    image: Sequence[Digest],
    sizes: Mapping[Digest, int],
    limits: Limits,
    tagged: Tagged | None = None,
    *,
    jobs: int = 1,
) -> tuple[list[Attachment], list[AttachmentResult]]:
    """Return the valid attachments of an image's manifests, and the others with what is wrong with them.

    An attachment comes after what it is attached to. `sizes` are those of the blobs of the image. The source
    is asked in up to `jobs` threads. Raises RegistryError if it cannot be told what is attached.
    """
    found: list[Attachment] = []
    left_out: list[AttachmentResult] = []
    seen: set[tuple[Digest, str]] = set()
    subjects, bytes_left, asked_left = image, _BYTES_LIMIT, _ASKED_LIMIT

    def read(listed: tuple[Descriptor, Digest]) -> Attachment | AttachmentResult:
        try:
            return _attachment(source, *listed, sizes, limits)
        except (FormatError, IntegrityError, NotFoundError) as error:
            return _failed(*listed, error)

    for _ in range(_DEPTH_LIMIT):
        chosen: list[tuple[Descriptor, Digest]] = []
        for each, subject in sorted(_listed(source, subjects, tagged, left_out, jobs), key=_rank):
            key = key_of(each)
            if key in seen or each.digest in image or _is_of_machine(each):
                continue
            seen.add(key)
            if len(found) + len(chosen) == LIMIT:
                left_out.append(
                    _failed(each, subject, FormatError(f"more than {LIMIT} attachments are not copied"))
                )
            elif each.size > bytes_left:
                problem = f"more than {_BYTES_LIMIT} bytes of manifests are not copied"
                left_out.append(_failed(each, subject, FormatError(problem)))
            else:
                bytes_left -= each.size
                chosen.append((each, subject))
        results = parallel.map_all(read, chosen, jobs, give_up=lambda _: source.cancel())
        new = [each for each in results if isinstance(each, Attachment)]
        left_out += [each for each in results if isinstance(each, AttachmentResult)]
        found += new
        # Signatures of signatures are the last to be expected.
        by_kind = sorted(new, key=lambda each: each.is_signature)
        subjects = list(dict.fromkeys(each.node.descriptor.digest for each in by_kind))
        if len(subjects) > asked_left:
            problem = f"what is attached to {len(subjects) - asked_left} attachments was not looked for"
            left_out.append(AttachmentResult(digest="", subject=subjects[asked_left], problem=problem))
        subjects = subjects[:asked_left]
        asked_left -= len(subjects)
        if not subjects:
            break
    return found, left_out


def _is_of_machine(each: Descriptor) -> bool:
    return each.annotations.get(media_types.SIGNER) == media_types.MACHINE


def _listed(
    source: Blobs,
    subjects: Sequence[Digest],
    tagged: Tagged | None,
    left_out: list[AttachmentResult],
    jobs: int,
) -> Iterator[tuple[Descriptor, Digest]]:
    """Yield what is listed as attached to some manifests, not checked."""

    def ask(digest: Digest) -> tuple[Sequence[Descriptor], list[AttachmentResult]]:
        return _ask(source, digest, tagged)

    count = 0
    answers = parallel.map_all(ask, subjects, jobs, give_up=lambda _: source.cancel())
    for digest, (listed, problems) in zip(subjects, answers, strict=True):
        left_out += problems
        count += len(listed)
        if count > _LISTED_LIMIT:
            problem = f"more than {_LISTED_LIMIT} attachments are not looked at"
            left_out.append(AttachmentResult(digest="", subject=digest, problem=problem))
            return
        yield from ((each, digest) for each in listed)


def _ask(
    source: Blobs, digest: Digest, tagged: Tagged | None
) -> tuple[Sequence[Descriptor], list[AttachmentResult]]:
    """Return what is listed as attached to a manifest, and what went wrong."""
    problems = []

    def tell(error: RekindleError) -> None:
        problems.append(AttachmentResult(digest="", subject=digest, problem=error.summary))

    listed: list[Descriptor] = []
    try:
        listed = source.referrers(digest)
    except FormatError as error:  # as for too many: then the signatures alone
        tell(error)
        with contextlib.suppress(FormatError):
            listed = source.referrers(digest, artifact_type=media_types.BUNDLE)
    for kind in cosign_tags.KINDS if tagged is not None else ():
        assert tagged is not None
        tag = cosign_tags.tag_of(digest, kind)
        try:
            there = tagged(tag)
        except CredentialsError:  # some refuse what they do not know
            continue
        except (FormatError, IntegrityError) as error:
            tell(error)
            continue
        if there is not None:
            annotations = {**there.annotations, media_types.OWN_TAG: tag}
            listed.append(structs.replace(there, annotations=annotations))
    return listed, problems


def _rank(listed: tuple[Descriptor, Digest]) -> int:
    return likelihood(listed[0])


def _attachment(
    source: Blobs, descriptor: Descriptor, subject: Digest, sizes: Mapping[Digest, int], limits: Limits
) -> Attachment:
    """Read an attachment. Its manifest must be small and refer to `subject`: the list of referrers may lie.

    Raises FormatError, IntegrityError, NotFoundError.
    """
    content = source.read(descriptor, limit_bytes=limits.manifest_bytes)
    fields = Fields.parse(content, "manifest", limit_bytes=limits.manifest_bytes)
    tag = descriptor.annotations.get(media_types.OWN_TAG, "")
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
    kind = fields.text("artifactType", "") or config
    types = [blob.media_type for blob in blobs.values()]
    return Attachment(
        node=Node(descriptor=descriptor, content=content),
        blobs=tuple(blobs.values()),
        subject=subject,
        # The images under cosign's tags have an ordinary config.
        artifact_type=types[-1] if tag and types else kind,
        is_signature=bool({kind, *types} & media_types.SIGNATURES),
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
    there: set[Digest],
    done: set[Digest],
    tally: Tally,
    hint: str = "",
) -> AttachmentResult:
    """Copy an attachment, and return the result.

    `there` are manifests, and `done` blobs, that are in the target already; what was copied is added. Raises
    RegistryError or CredentialsError if the target does not take a signature: else nobody would miss it
    before the image is verified.
    """
    name = each.node.descriptor
    if each.subject not in there:
        problem = FormatError("what it is attached to was not copied")
        return _failed(name, each.subject, problem, each.artifact_type)
    try:
        for blob in {blob.digest: blob for blob in each.blobs}.values():
            if blob.digest not in done:
                _copy_blob(blob, source, target, tally)
                done.add(blob.digest)
        if each.tag:
            there.add(cosign_tags.put(target, each.tag, each.node.content, name.media_type))
        else:
            # Also if it is there: an attempt that was interrupted may have left it unlisted.
            there.add(target.put_manifest(each.node.content, name.media_type))
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
        held = HeldBlob(source.read(blob, limit_bytes=blob.size))
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
