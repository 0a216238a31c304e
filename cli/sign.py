# SPDX-License-Identifier: Apache-2.0
"""`rekindle sign`: sign an image, in the formats that cosign reads."""

import argparse
from collections.abc import Sequence

from cli import _arguments, _report, _signing
from oci import attached, media_types, resolve, store
from oci import image as images
from oci.cache import image as cache_image
from oci.descriptor import Descriptor
from oci.layout import Layout
from oci.progress import Tally
from oci.reference import Reference, RegistryReference, parse
from oci.registry.repository import Repository
from oci.trust import attachments, signer
from oci.trust.bundle import SimpleSignature
from oci.trust.keys import SigningKey
from rekindle.digest import Digest
from rekindle.errors import UsageError
from rekindle.fields import Fields
from rekindle.report import ImageName, Outcome, Report


def main(words: Sequence[str]) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="rekindle sign",
        description="Sign the digest of an image, and that of the kernel cache in it, and attach the "
        "signatures as Sigstore bundles, which `cosign verify` (2.6 and newer) and `rekindle verify` read.",
    )
    parser.add_argument("image", metavar="IMAGE", help=_arguments.IMAGE)
    parser.add_argument(
        "--legacy-tag",
        action="store_true",
        help="with a key, also sign in the format that cosign before 2.6 reads",
    )
    parser.add_argument(
        "--yes-by-tag", action="store_true", help="sign the image that a registry has under a tag now"
    )
    _arguments.add_signing(parser)
    _arguments.add_registry(parser)
    _arguments.add_report(parser)
    args = parser.parse_args(words)
    report = _report.begin("sign", args)
    with _report.reporting(report, args):
        digest = _sign(args, parse(args.image), report)
    _report.finish(report, args, Outcome.SAVED, f"signed {args.image} {digest}")
    return 0


def _sign(args: argparse.Namespace, reference: Reference, report: Report) -> Digest:
    """Sign the image and return its digest."""
    key = _signing.chosen_key(args)
    by = _signing.chosen(args, key)
    if by is None:
        raise UsageError("no signing key", hint="add --sign-key cosign.key, --sign-keyless or --sign-command")
    if args.legacy_tag and not (key is not None and isinstance(reference, RegistryReference)):
        raise UsageError("--legacy-tag requires --sign-key or --sign-command, and an image in a registry")
    home = store.open_home()
    with home.work("sign") as work, resolve.source(reference, home, _arguments.registry(args)) as source:
        report.image = ImageName(reference=args.image, digest=source.root.digest)
        if isinstance(reference, RegistryReference) and reference.digest is None and not args.yes_by_tag:
            raise UsageError(
                f"{args.image} is {source.root.digest} now, and a tag can be moved",
                hint=f"sign what you have looked at: {reference.policy_name}@{source.root.digest}; "
                "or add --yes-by-tag to sign whatever the tag names",
            )
        staging = Layout.create(work / "layout")
        signed: list[Descriptor] = [source.root]
        if source.root.media_type == media_types.INDEX:
            image = images.load(source.blobs, source.root, source.limits)
            signed += [image.cache] if image.cache else []
            attested = signer.predicate(image.record)
        else:
            found = cache_image.load(source.blobs, source.root, source.limits)
            attested = {"created": found.created, "made_by": found.inventory.made_by}
        with report.phase("sign"):
            made = signer.sign(staging, signed, by, attested=attested)
        with report.phase("attach"):
            _attach(source, reference, staging, signed, made, key if args.legacy_tag else None)
        return source.root.digest


def _attach(
    source: resolve.FoundImage,
    reference: Reference,
    staging: Layout,
    subjects: Sequence[Descriptor],
    made: Sequence[Descriptor],
    legacy: SigningKey | None,
) -> None:
    """Attach signatures to their image where it is stored."""
    if isinstance(source.blobs, Layout):
        source.blobs.attach(staging, made)
        return
    assert isinstance(source.blobs, Repository)
    staging.attach(staging, made)
    found, left_out = attached.find(staging, [each.digest for each in subjects], {}, source.limits)
    assert not left_out
    done: set[Digest] = set()
    for each in found:
        attached.copy(each, staging, source.blobs, done=done, tally=Tally())
    source.blobs.settle()
    if legacy is not None:
        simple = SimpleSignature.sign(source.root.digest, reference.policy_name, legacy)
        image = attachments.store_simple(staging, [simple])
        content = staging.read(image, limit_bytes=image.size)
        for blob in attached.children(
            Fields.parse(content, "manifest", limit_bytes=image.size), source.limits
        ):
            source.blobs.upload(blob, staging)
        tag = attachments.simple_tag(source.root.digest)
        attached.put_simple(source.blobs, tag, attached.simple_layers(content))
