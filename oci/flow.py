# SPDX-License-Identifier: Apache-2.0
"""The public operations on images: copy one, and find out who signed it."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from msgspec import Struct

from oci import resolve, store
from oci.options import RegistryOptions, TrustOptions
from oci.reference import LayoutReference, RegistryReference, parse
from rekindle.digest import Digest
from rekindle.home import Home
from rekindle.report import AttachmentResult, ByteCounts, ImageName, Report

if TYPE_CHECKING:
    from oci.layout import Layout
    from oci.progress import Tally
    from oci.trust.verifier import Trust

Show = Callable[["Tally"], contextlib.AbstractContextManager[None]]
"""A context manager that shows people the progress that a tally counts."""


class Copied(Struct, frozen=True, kw_only=True):
    """The result of a copy: the digest, the bytes moved, and the digest of the image that was replaced.

    `attachments` tells which signatures and other attachments were copied, and why others were not.
    """

    digest: Digest
    tally: "Tally"
    replaced: Digest | None = None
    attachments: "Sequence[AttachmentResult]" = ()


def copy(
    source: str,
    target: str,
    *,
    registry: RegistryOptions | None = None,
    report: Report | None = None,
    show: "Show | None" = None,
    attachments: bool = True,
) -> Copied:
    """Copy an image with its signatures between the local store, OCI layouts and registries.

    Digests do not change, and everything is checked against them on the way. Blobs that the target has are
    not sent, and its tag is set last. If the target does not take a signature, the copy fails and the tag is
    not set; without `attachments`, the image is copied alone. Raises NotFoundError, RegistryError,
    CredentialsError, IntegrityError, SpaceError.
    """
    from oci import transfer
    from oci.registry.repository import Repository

    report = report or Report(verb="copy")
    origin, goal = parse(source), parse(target)
    home = store.open_home()
    access = resolve.access(registry or RegistryOptions(), home)
    replaced: Digest | None = None
    with contextlib.ExitStack() as stack:
        with report.phase("resolve"):
            blobs: Layout | Repository
            if isinstance(origin, LayoutReference):
                layout = store.layout_of(origin, home)
                stack.enter_context(layout.reading())
                layout = layout.frozen()
                blobs, root = layout, layout.resolve(origin.tag)
            else:
                blobs = stack.enter_context(Repository(origin, access))
                root = blobs.resolve()
            tree = transfer.explore(
                blobs,
                root,
                access.config.limits,
                tagged=blobs.tagged,
                attachments=attachments,
                jobs=access.config.transfer.jobs,
            )
        report.image = ImageName(reference=target, digest=root.digest)
        stack.enter_context(_counted(report, access.tally))
        with report.phase("transfer"), show(access.tally) if show else contextlib.nullcontext():
            if isinstance(goal, RegistryReference):
                same = isinstance(origin, RegistryReference) and origin.host == goal.host
                # The registry can mount these blobs itself.
                mount_from = [origin.repository] if isinstance(origin, RegistryReference) and same else []
                results = transfer.into_registry(blobs, tree, goal, access, mount_from=mount_from)
            else:
                layout = store.layout_of(goal, home, create=True)
                if warning := store.others_can_read(goal):
                    report.say(warning)
                before = layout.tags().get(goal.tag)
                with store.collecting(layout, goal):
                    results = transfer.into_layout(blobs, tree, layout, goal.tag, access)
                if before is not None and before.digest != root.digest:
                    replaced = before.digest
    report.attachments = results
    return Copied(digest=root.digest, tally=access.tally, replaced=replaced, attachments=results)


def verify(
    image: str, *, trust: TrustOptions | None = None, registry: RegistryOptions | None = None
) -> "tuple[Digest, Trust]":
    """Verify an image by the given rule or policy; return its digest and signer. Raises TrustError."""
    reference, home = parse(image), Home.from_environment()
    with resolve.source(reference, home, registry or RegistryOptions()) as source:
        verified = resolve.verified(source, reference, home, trust or TrustOptions())
        return source.root.digest, verified.trust


def tags(where: str, *, registry: RegistryOptions | None = None) -> list[str]:
    """Return the tags of a repository or a layout, given its name, without those of signatures.

    Raises NotFoundError, RegistryError, CredentialsError.
    """
    reference, home = parse(where), Home.from_environment()
    if isinstance(reference, LayoutReference):
        layout = store.layout_of(reference, home)
        found = sorted(layout.tags())
        name = reference.tag.partition(":")[0]
        return found if reference.directory else [tag for tag in found if tag.startswith(f"{name}:")]
    from oci.registry.repository import Repository

    with Repository(reference, resolve.access(registry or RegistryOptions(), home)) as repository:
        return repository.tags()


@contextlib.contextmanager
def _counted(report: Report, tally: "Tally") -> Iterator[None]:
    """Write the bytes moved into the report, also when the copy fails."""
    try:
        yield
    finally:
        report.bytes = ByteCounts(
            fetched=tally.fetched_bytes, sent=tally.sent_bytes, reused=tally.reused_bytes
        )
