# SPDX-License-Identifier: Apache-2.0
"""Copy images between places: only missing blobs, many at once, the tag last."""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Protocol

from msgspec import Struct

from oci import media_types
from oci.descriptor import Blobs, Descriptor
from oci.layout import Layout
from oci.progress import Tally
from oci.reference import RegistryReference
from oci.registry.access import Access
from oci.registry.repository import Repository
from rekindle.config import Limits
from rekindle.digest import Digest
from rekindle.errors import FormatError, IntegrityError, NotFoundError, UsageError
from rekindle.fields import Fields

_DEPTH_LIMIT = 4
_NODES_LIMIT = 1000
_NODES_BYTES = 64 << 20  # of all manifests together: they are held in memory
_ATTACHMENTS_LIMIT = 64
_LISTED_LIMIT = 1000  # how many attachments of an image are read


class Destination(Protocol):
    """A place to copy images to: a layout, or a repository of a registry."""

    def has(self, descriptor: Descriptor) -> bool:
        """Tell whether a blob or manifest is there already."""

    def mount(self, descriptor: Descriptor) -> bool:
        """Take a blob from another repository of the destination. False if it must be uploaded."""

    def upload(self, descriptor: Descriptor, source: Blobs) -> None:
        """Copy a blob. It appears when all of it was received and its digest matched."""

    def put_manifest(self, content: bytes, media_type: str, name: str | None = None) -> Digest:
        """Store a manifest under its digest or a tag. Everything that it lists must be there."""

    def cancel(self) -> None:
        """Abort the transfers of other threads, where they could take long."""


class Node(Struct, frozen=True, kw_only=True):
    """A manifest or index of an image, with the bytes to store."""

    descriptor: Descriptor
    content: bytes


class Attachment(Struct, frozen=True, kw_only=True):
    """A small manifest that refers to an image, such as a signature, and its blobs."""

    node: Node
    blobs: Sequence[Descriptor]


class Tree(Struct, frozen=True, kw_only=True):
    """Everything that an image consists of. A node comes after those that it lists; the last is the root.

    `attached` is not part of the image, and is copied with it where possible.
    """

    nodes: Sequence[Node]
    blobs: Sequence[Descriptor]
    attached: Sequence[Attachment] = ()


def explore(source: Blobs, root: Descriptor, limits: Limits) -> Tree:
    """Read the manifests of an image, each checked against its digest.

    Attachments that are malformed or exceed the limits are left out. Raises FormatError if the image itself
    is or does.
    """
    nodes: dict[Digest, Node] = {}
    blobs: dict[Digest, Descriptor] = {}
    sizes: dict[Digest, int] = {}
    if root.media_type not in media_types.DOCUMENTS:
        raise FormatError(f"{root.digest} is not an image", cause=f"its type is {root.media_type!r:.80}")

    def visit(descriptor: Descriptor, depth: int) -> None:
        if sizes.setdefault(descriptor.digest, descriptor.size) != descriptor.size:
            raise FormatError(f"{root.digest} lists {descriptor.digest} with two sizes")
        if descriptor.media_type not in media_types.DOCUMENTS:
            blobs.setdefault(descriptor.digest, descriptor)
            return
        if descriptor.digest in nodes:
            return
        if depth > _DEPTH_LIMIT or len(nodes) > _NODES_LIMIT:
            raise FormatError(f"{root.digest} has too many manifests, or indexes nested too deep")
        if sum(len(node.content) for node in nodes.values()) > _NODES_BYTES:
            raise FormatError(f"{root.digest} has more than {_NODES_BYTES} bytes of manifests")
        content = source.read(descriptor, limit_bytes=limits.manifest_bytes)
        fields = Fields.parse(content, "manifest", limit_bytes=limits.manifest_bytes)
        for child in _children(fields, limits):
            visit(child, depth + 1)
        nodes[descriptor.digest] = Node(descriptor=descriptor, content=content)

    visit(root, 0)
    return Tree(
        nodes=tuple(nodes.values()),
        blobs=tuple(blobs.values()),
        attached=tuple(itertools.islice(_attached(source, list(nodes), sizes, limits), _ATTACHMENTS_LIMIT)),
    )


def _attached(
    source: Blobs, image: Sequence[Digest], sizes: Mapping[Digest, int], limits: Limits
) -> Iterator[Attachment]:
    """Yield the valid attachments of an image's manifests.

    Invalid ones are skipped: anyone who can attach something must not be able to make the image unusable.
    """
    seen = set(image)
    listed_left, bytes_left = _LISTED_LIMIT, _NODES_BYTES
    for digest in image:
        listed: Sequence[Descriptor] = ()
        with contextlib.suppress(FormatError):
            listed = source.referrers(digest)
        for each in listed:
            if each.digest in seen or each.annotations.get(media_types.SIGNER) == media_types.MACHINE:
                continue
            listed_left -= 1
            if listed_left < 0:
                return
            with contextlib.suppress(FormatError, IntegrityError, NotFoundError):
                attachment = _attachment(source, each, digest, sizes, limits)
                bytes_left -= len(attachment.node.content)
                if bytes_left < 0:
                    return
                seen.add(each.digest)
                yield attachment


def _attachment(
    source: Blobs, descriptor: Descriptor, subject: Digest, sizes: Mapping[Digest, int], limits: Limits
) -> Attachment:
    """Read an attachment. Its manifest must be small and refer to `subject`: the list of referrers may lie.

    Raises FormatError, IntegrityError, NotFoundError.
    """
    content = source.read(descriptor, limit_bytes=limits.manifest_bytes)
    fields = Fields.parse(content, "manifest", limit_bytes=limits.manifest_bytes)
    if not fields.has("subject") or fields.inner("subject").text("digest") != subject:
        raise FormatError(f"{descriptor.digest} does not refer to {subject}")
    blobs: dict[Digest, Descriptor] = {}
    for child in _children(fields, limits):
        if child.media_type in media_types.DOCUMENTS:
            raise FormatError(f"the attachment {descriptor.digest} lists manifests")
        expected = blobs.setdefault(child.digest, child).size
        if {expected, sizes.get(child.digest, expected)} != {child.size}:
            raise FormatError(f"{descriptor.digest} lists {child.digest} with another size")
    if sum(blob.size for blob in blobs.values()) > limits.record_bytes:
        raise FormatError(f"the attachment {descriptor.digest} is larger than {limits.record_bytes} bytes")
    return Attachment(node=Node(descriptor=descriptor, content=content), blobs=tuple(blobs.values()))


def _children(fields: Fields, limits: Limits) -> Iterator[Descriptor]:
    if fields.has("manifests"):
        yield from fields.list_of("manifests", Descriptor.from_json, at_most=limits.layers)
    if fields.has("config"):
        yield Descriptor.from_json(fields.json("config"), "manifest.config")
    if fields.has("layers"):
        yield from fields.list_of("layers", Descriptor.from_json, at_most=limits.layers)


def into_layout(source: Blobs, tree: Tree, layout: Layout, tag: str, access: Access) -> None:
    """Copy an image to a layout. After an interruption, the next attempt continues."""
    root = tree.nodes[-1].descriptor
    with layout.incoming(root.digest) as arrival:
        jobs = access.config.transfer.jobs
        attached = copy(source, tree, arrival, tag=None, jobs=jobs, tally=access.tally)
        arrival.publish(root, tag, attached)


def into_registry(
    source: Blobs, tree: Tree, target: RegistryReference, access: Access, *, mount_from: Sequence[str] = ()
) -> None:
    """Copy an image to a registry. `mount_from` are repositories of it that may have the blobs.

    Raises UsageError if the target names another digest than the image's.
    """
    digest = tree.nodes[-1].descriptor.digest
    if target.digest not in {None, digest}:
        raise UsageError(f"{target} names another digest than the image has", cause=str(digest))
    tag = None if target.digest else target.tag
    with Repository(target, access, mount_from=mount_from) as repository:
        # Log in once before all connections are used: failing on all at once might lock an account.
        repository.has(tree.nodes[-1].descriptor)
        copy(source, tree, repository, tag=tag, jobs=access.config.transfer.jobs, tally=access.tally)


def copy(
    source: Blobs,
    tree: Tree,
    target: Destination,
    *,
    tag: str | None,
    jobs: int,
    tally: Tally,
) -> list[Descriptor]:
    """Copy an image; store its root last, under `tag` if that is given.

    Returns the attachments that were copied; invalid ones are left out. Raises what the source and the target
    raise; what was copied until then stays there for the next attempt.
    """
    of_attached = [blob for each in tree.attached for blob in each.blobs]
    for blob in {blob.digest: blob for blob in (*tree.blobs, *of_attached)}.values():
        tally.expect(blob.size)

    done: set[Digest] = set()

    def copy_blob(blob: Descriptor) -> None:
        if target.has(blob) or target.mount(blob):
            tally.reuse(blob.size)
        else:
            target.upload(blob, source)
        done.add(blob.digest)

    while not _copy_all([b for b in tree.blobs if b.digest not in done], copy_blob, source, target, jobs):
        pass
    for node in tree.nodes[:-1]:
        if not target.has(node.descriptor):
            target.put_manifest(node.content, node.descriptor.media_type)
    attached = []
    for each in tree.attached:
        blobs = [blob for blob in each.blobs if blob.digest not in done]
        with contextlib.suppress(FormatError, IntegrityError, NotFoundError):
            _copy_attached(blobs, copy_blob, source)
            if not target.has(each.node.descriptor):
                target.put_manifest(each.node.content, each.node.descriptor.media_type)
            attached.append(each.node.descriptor)
    root = tree.nodes[-1]
    target.put_manifest(root.content, root.descriptor.media_type, tag)
    return attached


def _copy_attached(
    blobs: Sequence[Descriptor], copy_blob: Callable[[Descriptor], None], source: Blobs
) -> None:
    """Copy a few small blobs, one by one. If one fails, nothing else is aborted."""
    for blob in blobs:
        while True:
            try:
                copy_blob(blob)
                break
            except IntegrityError:
                if not source.fall_back_to_origin():
                    raise


def _copy_all(
    blobs: Sequence[Descriptor],
    copy_blob: Callable[[Descriptor], None],
    source: Blobs,
    target: Destination,
    jobs: int,
) -> bool:
    """Copy blobs in parallel. False if the source sent wrong bytes and can fall back to its origin."""
    # The largest first: the small ones then fill the gaps.
    ordered = sorted(blobs, key=lambda blob: -blob.size)
    with ThreadPoolExecutor(max(1, min(jobs, len(ordered)))) as pool:
        running = [pool.submit(copy_blob, blob) for blob in ordered]
        try:
            for job in as_completed(running):  # the first failure ends all
                job.result()
            return True
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            # Not the target: another attempt needs it.
            if isinstance(error, IntegrityError) and source.fall_back_to_origin():
                return False
            source.cancel()
            target.cancel()
            raise
