# SPDX-License-Identifier: Apache-2.0
"""Images from one place to another: only what is not there yet, many blobs at once, the tag last."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Protocol

from oci import media_types
from oci.descriptor import Blobs, Descriptor
from oci.layout import Layout
from oci.progress import Tally
from oci.reference import RegistryReference
from oci.registry.repository import Access, Repository
from rekindle.config import Limits
from rekindle.digest import Digest
from rekindle.errors import FormatError, IntegrityError, NotFoundError, UsageError
from rekindle.fields import Fields

_DEPTH_LIMIT = 4
_NODES_LIMIT = 1000
_NODES_BYTES = 64 << 20  # of all manifests together: they are held in memory


class Target(Protocol):
    """What images can be brought to: a layout, or a repository of a registry."""

    def has(self, descriptor: Descriptor) -> bool:
        """Whether it is there, and need not be brought."""

    def mount(self, descriptor: Descriptor) -> bool:
        """Takes a blob over from where the target has it already; False if it has to be brought."""

    def upload(self, descriptor: Descriptor, source: Blobs) -> None:
        """Brings a blob. Nothing of it is there until all of it is, and its digest matched."""

    def put_manifest(self, content: bytes, media_type: str, name: str | None = None) -> Digest:
        """Stores a manifest whose parts are there, under its digest or a tag."""

    def cancel(self) -> None:
        """Ends what is under way in other threads, where it could take long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A manifest or index of an image, as it is to be stored."""

    descriptor: Descriptor
    content: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Tree:
    """All that an image consists of. `nodes` come after those that they name; the last is the root.

    `attached` are those of them that nothing names, but that refer to the image: its signatures.
    """

    nodes: Sequence[Node]
    blobs: Sequence[Descriptor]
    attached: Sequence[Descriptor] = ()


def explore(source: Blobs, root: Descriptor, limits: Limits) -> Tree:
    """Reads the manifests of an image, each checked against its digest.

    Raises FormatError for what is no image, or exceeds the limits.
    """
    nodes: dict[Digest, Node] = {}
    blobs: dict[Digest, Descriptor] = {}
    sizes: dict[Digest, int] = {}
    if root.media_type not in media_types.DOCUMENTS:
        raise FormatError(f"{root.digest} is no image", cause=f"its type is {root.media_type!r:.80}")

    def visit(descriptor: Descriptor, depth: int) -> None:
        if sizes.setdefault(descriptor.digest, descriptor.size) != descriptor.size:
            raise FormatError(f"{root.digest} gives {descriptor.digest} two sizes")
        if descriptor.media_type not in media_types.DOCUMENTS:
            blobs.setdefault(descriptor.digest, descriptor)
            return
        if descriptor.digest in nodes:
            return
        if depth > _DEPTH_LIMIT or len(nodes) > _NODES_LIMIT:
            raise FormatError(f"{root.digest} has more indexes within indexes than is sane")
        if sum(len(node.content) for node in nodes.values()) > _NODES_BYTES:
            raise FormatError(f"{root.digest} has more than {_NODES_BYTES} bytes of manifests")
        content = source.read(descriptor, limit_bytes=limits.manifest_bytes)
        fields = Fields.parse(content, "manifest", limit_bytes=limits.manifest_bytes)
        for child in _children(fields, limits):
            visit(child, depth + 1)
        nodes[descriptor.digest] = Node(descriptor=descriptor, content=content)

    visit(root, 0)
    image = list(nodes.values())
    attached = [each for node in image for each in _attached(source, node.descriptor.digest, limits)]
    for each in attached:
        visit(each, 1)
    of_them = [node for digest, node in nodes.items() if node not in image]
    return Tree(
        nodes=(*image[:-1], *of_them, image[-1]), blobs=tuple(blobs.values()), attached=tuple(attached)
    )


def _attached(source: Blobs, digest: Digest, limits: Limits) -> Iterator[Descriptor]:
    """The small manifests that really refer to one. A list of them may say anything, and whoever can attach
    something to an image must not be able to break it, or to make everybody fetch gigabytes."""
    for each in source.referrers(digest):
        if each.annotations.get(media_types.SIGNER) == media_types.MACHINE:
            continue
        with contextlib.suppress(FormatError, IntegrityError, NotFoundError):
            content = source.read(each, limit_bytes=limits.manifest_bytes)
            fields = Fields.parse(content, "manifest", limit_bytes=limits.manifest_bytes)
            children = list(_children(fields, limits))
            if (
                fields.has("subject")
                and fields.inner("subject").text("digest") == digest
                and not any(child.media_type in media_types.DOCUMENTS for child in children)
                and sum(child.size for child in children) <= limits.record_bytes
            ):
                yield each


def _children(fields: Fields, limits: Limits) -> Iterator[Descriptor]:
    if fields.has("manifests"):
        yield from fields.list_of("manifests", Descriptor.from_json, at_most=limits.layers)
    if fields.has("config"):
        yield Descriptor.from_json(fields.json("config"), "manifest.config")
    if fields.has("layers"):
        yield from fields.list_of("layers", Descriptor.from_json, at_most=limits.layers)


def into_layout(source: Blobs, tree: Tree, layout: Layout, tag: str, access: Access) -> None:
    """Brings an image to a layout. What came before an interruption stays for the next try."""
    root = tree.nodes[-1].descriptor
    with layout.incoming(root.digest) as arrival:
        copy(source, tree, arrival, tag=None, jobs=access.config.patience.jobs, tally=access.tally)
        arrival.publish(root, tag, tree.attached)


def into_registry(
    source: Blobs, tree: Tree, target: RegistryReference, access: Access, *, mount_from: Sequence[str] = ()
) -> None:
    """Brings an image to a registry. `mount_from` are repositories of it that may have its blobs.

    Raises UsageError if the target's digest is not the image's.
    """
    digest = tree.nodes[-1].descriptor.digest
    if target.digest not in {None, digest}:
        raise UsageError(f"{target} asks for another digest than the image has", cause=str(digest))
    tag = None if target.digest else target.tag
    with Repository(target, access, mount_from=mount_from) as repository:
        # Asks who we are to it once, and not over all connections at a time: that might lock an account.
        repository.has(tree.nodes[-1].descriptor)
        copy(source, tree, repository, tag=tag, jobs=access.config.patience.jobs, tally=access.tally)


def copy(
    source: Blobs,
    tree: Tree,
    target: Target,
    *,
    tag: str | None,
    jobs: int,
    tally: Tally,
) -> None:
    """Brings an image to a target; its root under `tag`, if there is one, and last of all.

    Raises what the source and the target raise. What has come until then stays, for the next try.
    """
    for blob in tree.blobs:
        tally.expect(blob.size)

    done: set[Digest] = set()

    def bring(blob: Descriptor) -> None:
        if target.has(blob) or target.mount(blob):
            tally.reuse(blob.size)
        else:
            target.upload(blob, source)
        done.add(blob.digest)

    while not _bring_all([b for b in tree.blobs if b.digest not in done], bring, source, target, jobs):
        pass
    for node in tree.nodes[:-1]:
        if not target.has(node.descriptor):
            target.put_manifest(node.content, node.descriptor.media_type)
    root = tree.nodes[-1]
    target.put_manifest(root.content, root.descriptor.media_type, tag)


def _bring_all(
    blobs: Sequence[Descriptor],
    bring: Callable[[Descriptor], None],
    source: Blobs,
    target: Target,
    jobs: int,
) -> bool:
    """Brings blobs side by side. False if the source gave wrong bytes and has another place to try."""
    # The largest first: the small ones then fill the gaps.
    ordered = sorted(blobs, key=lambda blob: -blob.size)
    with ThreadPoolExecutor(max(1, min(jobs, len(ordered)))) as pool:
        running = [pool.submit(bring, blob) for blob in ordered]
        try:
            for job in as_completed(running):  # the first to fail ends all
                job.result()
            return True
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            # The target is not to be cancelled before another try: that needs it.
            if isinstance(error, IntegrityError) and source.distrust():
                return False
            source.cancel()
            target.cancel()
            raise
