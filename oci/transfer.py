# SPDX-License-Identifier: Apache-2.0
"""Copy images between places: only missing blobs, many at once, the tag last."""

from collections.abc import Callable, Sequence

from msgspec import Struct, structs

from oci import attached, media_types, parallel
from oci.attached import Attachment, Tagged, children
from oci.descriptor import Blobs, Descriptor
from oci.destination import Destination, Node
from oci.layout import Layout
from oci.progress import Tally
from oci.reference import RegistryReference
from oci.registry.access import Access
from oci.registry.repository import Repository
from rekindle.config import Limits
from rekindle.digest import Digest
from rekindle.errors import FormatError, IntegrityError, UsageError
from rekindle.fields import Fields
from rekindle.report import AttachmentResult

_DEPTH_LIMIT = 4
_NODES_LIMIT = 1000
_NODES_BYTES = 64 << 20  # of all manifests together: they are held in memory


class Tree(Struct, frozen=True, kw_only=True):
    """Everything that an image consists of. A node comes after those that it lists; the last is the root.

    `attached` is not part of the image, and is copied with it where possible. `left_out` is what cannot be.
    """

    nodes: Sequence[Node]
    blobs: Sequence[Descriptor]
    attached: Sequence[Attachment] = ()
    left_out: Sequence[AttachmentResult] = ()


def explore(
    source: Blobs,
    root: Descriptor,
    limits: Limits,
    *,
    tagged: Tagged | None = None,
    attachments: bool = True,
    jobs: int = 1,
) -> Tree:
    """Read the manifests of an image, each checked against its digest, and those of its attachments.

    `tagged` finds what cosign stored under tags. The source is asked for attachments in up to `jobs` threads;
    those that are malformed or exceed the limits are left out. Raises FormatError if the image itself is or
    does.
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
        for child in children(fields, limits):
            visit(child, depth + 1)
        nodes[descriptor.digest] = Node(descriptor=descriptor, content=content)

    visit(root, 0)
    tree = Tree(nodes=tuple(nodes.values()), blobs=tuple(blobs.values()))
    if not attachments:
        return tree
    found, left_out = attached.find(source, list(nodes), sizes, limits, tagged, jobs=jobs)
    return structs.replace(tree, attached=found, left_out=left_out)


def into_layout(
    source: Blobs, tree: Tree, layout: Layout, tag: str, access: Access
) -> list[AttachmentResult]:
    """Copy an image to a layout. After an interruption, the next attempt continues.

    Returns the results for its attachments.
    """
    root = tree.nodes[-1].descriptor
    with layout.incoming(root.digest) as arrival:
        jobs = access.config.transfer.jobs
        results = copy(source, tree, arrival, tag=None, jobs=jobs, tally=access.tally)
        copied = {each.digest for each in results if not each.problem}
        listed = [
            a.node.descriptor for a in tree.attached if not a.tag and a.node.descriptor.digest in copied
        ]
        arrival.publish(root, tag, listed)
    return [*results, *tree.left_out]


def into_registry(
    source: Blobs, tree: Tree, target: RegistryReference, access: Access, *, mount_from: Sequence[str] = ()
) -> list[AttachmentResult]:
    """Copy an image to a registry. `mount_from` are repositories of it that may have the blobs.

    Returns the results for its attachments. Raises UsageError if the target names another digest than the
    image's, and RegistryError or CredentialsError if the registry does not take a signature.
    """
    digest = tree.nodes[-1].descriptor.digest
    if target.digest not in {None, digest}:
        raise UsageError(f"{target} names another digest than the image has", cause=str(digest))
    tag = None if target.digest else target.tag
    with Repository(target, access, mount_from=mount_from) as repository:
        # Log in once before all connections are used: failing on all at once might lock an account.
        repository.has(tree.nodes[-1].descriptor)
        results = copy(
            source, tree, repository, tag=tag, jobs=access.config.transfer.jobs, tally=access.tally
        )
    return [*results, *tree.left_out]


def copy(
    source: Blobs,
    tree: Tree,
    target: Destination,
    *,
    tag: str | None,
    jobs: int,
    tally: Tally,
) -> list[AttachmentResult]:
    """Copy an image, then what is attached to it; store its root last, under `tag` if that is given.

    Returns the results for its attachments. Raises what the source and the target raise, also if the target
    does not take a signature; what was copied until then stays there for the next attempt.
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
    root = tree.nodes[-1]
    if tree.attached or tag is None:  # some registries take nothing whose subject is not there
        target.put_manifest(root.content, root.descriptor.media_type)
    hint = "the tag was not written; --no-attachments copies the image without its signatures"
    there = {node.descriptor.digest for node in tree.nodes}
    results = [
        attached.copy(each, source, target, there=there, done=done, tally=tally, hint=hint)
        for each in tree.attached
    ]
    if tag is not None:
        target.settle()
        target.put_manifest(root.content, root.descriptor.media_type, tag)
    target.settle()
    return results


def _copy_all(
    blobs: Sequence[Descriptor],
    copy_blob: Callable[[Descriptor], None],
    source: Blobs,
    target: Destination,
    jobs: int,
) -> bool:
    """Copy blobs in parallel. False if the source sent wrong bytes and can fall back to its origin."""
    has_fallen_back = False

    def give_up(error: BaseException) -> None:
        nonlocal has_fallen_back
        has_fallen_back = isinstance(error, IntegrityError) and source.fall_back_to_origin()
        if not has_fallen_back:  # else the target is needed for another attempt
            source.cancel()
            target.cancel()

    # The largest first: the small ones then fill the gaps.
    ordered = sorted(blobs, key=lambda blob: -blob.size)
    try:
        parallel.map_all(copy_blob, ordered, jobs, give_up=give_up)
    except IntegrityError:
        if not has_fallen_back:
            raise
    return not has_fallen_back
