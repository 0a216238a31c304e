# SPDX-License-Identifier: Apache-2.0
"""`rekindle sign`: sign an image, in the formats that cosign reads."""

import argparse
import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import structs

from cli import _arguments, _report, _signing
from oci import attached, cosign_tags, media_types, resolve, store
from oci import image as images
from oci.cache import image as cache_image
from oci.descriptor import Descriptor
from oci.layout import Layout
from oci.progress import Tally
from oci.reference import Reference, RegistryReference, parse
from oci.registry.repository import Repository
from oci.trust import attachments, signer, verifier
from oci.trust.bundle import Bundle, SimpleSignature
from oci.trust.keys import SigningKey
from oci.trust.machine import machine_public
from oci.trust.policy import TrustRule
from oci.trust.statement import SNAPSHOT, Statement
from rekindle.digest import Digest
from rekindle.errors import RekindleError, UsageError
from rekindle.fields import JSON, Fields
from rekindle.home import Home
from rekindle.report import ImageName, Outcome, Report

if TYPE_CHECKING:
    from oci.trust.certificate import Chain


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
        help="with a key, also sign and attest in the format that cosign before 2.6 reads",
    )
    parser.add_argument(
        "--certificate",
        type=Path,
        metavar="PEM",
        help="also sign in that format with this certificate of --sign-key, which an authority of your own "
        "issued, as KServe verifies it",
    )
    parser.add_argument(
        "--certificate-chain", type=Path, metavar="PEM", help="the certificates above that one"
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
    chain = _chain(args, key)
    home = store.open_home()
    with home.work("sign") as work, resolve.source(reference, home, _arguments.registry(args)) as source:
        report.image = ImageName(reference=args.image, digest=source.root.digest)
        if isinstance(reference, RegistryReference) and reference.digest is None and not args.yes_by_tag:
            _require_made_here(args.image, reference, source, home)
            report.say(f"{args.image} is {source.root.digest}, which this machine has made")
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
            _attach(source, staging, signed, made)
            if key is not None and (args.legacy_tag or chain is not None):
                _sign_older(source, reference, staging, signed, attested, key, chain)
            if isinstance(source.blobs, Repository):
                source.blobs.settle()
        return source.root.digest


def _require_made_here(
    name: str, reference: RegistryReference, source: resolve.FoundImage, home: Home
) -> None:
    """Raise UsageError unless what a tag names is in the local store, with the signature of this machine."""
    machine = machine_public(home)
    if machine is not None:
        rule = TrustRule(name="", keys=(machine,))
        with contextlib.suppress(RekindleError):
            verifier.verify(None, Layout(home.store), source.root, rule, source.limits)
            return
    raise UsageError(
        f"{name} is {source.root.digest} now, and a tag can be moved",
        cause="this machine has not made that image",
        hint=f"sign what you have looked at: {reference.policy_name}@{source.root.digest}; "
        "or add --yes-by-tag to sign whatever the tag names",
    )


def _chain(args: argparse.Namespace, key: SigningKey | None) -> "Chain | None":
    """Return the certificate of the key that the command line names, or None. Raises UsageError."""
    if args.certificate is None:
        if args.certificate_chain is not None:
            raise UsageError("--certificate-chain requires --certificate")
        return None
    if key is None or not isinstance(parse(args.image), RegistryReference):
        raise UsageError("--certificate requires --sign-key or --sign-command, and an image in a registry")
    from oci.trust import certificate

    return certificate.read(key.public, args.certificate, args.certificate_chain)


def _attach(
    source: resolve.FoundImage,
    staging: Layout,
    subjects: Sequence[Descriptor],
    made: Sequence[Descriptor],
) -> None:
    """Attach signatures to their image where it is stored."""
    if isinstance(source.blobs, Layout):
        source.blobs.attach(staging, made)
        return
    assert isinstance(source.blobs, Repository)
    staging.attach(staging, made)
    found, left_out = attached.find(staging, [each.digest for each in subjects], {}, source.limits)
    assert not left_out
    there, done = {each.digest for each in subjects}, set[Digest]()
    for each in found:
        attached.copy(each, staging, source.blobs, there=there, done=done, tally=Tally())


def _sign_older(
    source: resolve.FoundImage,
    reference: Reference,
    staging: Layout,
    subjects: Sequence[Descriptor],
    attested: Mapping[str, JSON],
    key: SigningKey,
    chain: "Chain | None",
) -> None:
    """Add signatures and the attestation of the first subject in the form of cosign before 2.6."""
    assert isinstance(source.blobs, Repository)
    for subject in subjects:
        simple = SimpleSignature.sign(subject.digest, reference.policy_name, key)
        if chain is not None:
            simple = structs.replace(simple, certificate=chain.certificate, above=chain.above)
        older = {cosign_tags.SIGNATURES: attachments.store_simple(staging, [simple])}
        if subject is subjects[0]:
            statement = Statement(subject=subject.digest, predicate_type=SNAPSHOT, predicate=attested)
            bundle = Bundle.sign(statement, key)
            older[cosign_tags.ATTESTATIONS] = attachments.store_envelope(staging, bundle, SNAPSHOT, simple)
        for kind, image in older.items():
            content = staging.read(image, limit_bytes=image.size)
            fields = Fields.parse(content, "manifest", limit_bytes=image.size)
            for blob in attached.children(fields, source.limits):
                source.blobs.upload(blob, staging)
            tag = cosign_tags.tag_of(subject.digest, kind)
            cosign_tags.put(source.blobs, tag, content, image.media_type)
