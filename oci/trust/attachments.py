# SPDX-License-Identifier: Apache-2.0
"""Find and store signatures: manifests that refer to the image, or the tags that cosign used before 2.6.

A bundle is the only layer of a manifest whose `subject` is the image (OCI image specification 1.1). An older
signature is a layer of the image under the tag `sha256-HEX.sig`, with the signature in an annotation. A layer
of the image under `sha256-HEX.att` is an older attestation, in an envelope.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime

from msgspec import structs

from oci import cosign_tags, media_types
from oci.descriptor import Blobs, Descriptor, readable
from oci.layout import Layout
from oci.likelihood import LIMIT, likelihood
from oci.trust import bundle as bundles
from oci.trust.bundle import Bundle, OlderAttestation, SimpleSignature
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

_CERTIFICATE = "dev.sigstore.cosign/certificate"
_CHAIN = "dev.sigstore.cosign/chain"
_ENTRY = "dev.sigstore.cosign/bundle"
_KIND = "predicateType"  # of an older attestation


def find(
    source: Blobs,
    digest: Digest,
    limits: Limits,
    failures: list[RekindleError],
    *,
    is_enough: Callable[[], bool] = lambda: False,
) -> Iterator[Bundle]:
    """Yield the bundles that are attached to an image, not verified, those first that can be signatures.

    Malformed ones and those of another image are skipped, since anyone may attach anything. What could not
    be read is added to `failures`: it may have been a signature. Bundles that are listed as statements of
    another kind, such as reports, are not read if `is_enough` says so before.
    """
    try:
        listed = source.referrers(digest, artifact_type=bundles.MEDIA_TYPE)
    except (FormatError, RegistryError, CredentialsError) as error:
        failures.append(error)
        return
    listed = sorted(listed, key=likelihood)
    may_be_signatures = sum(likelihood(each) < 2 for each in listed)
    for number, descriptor in enumerate(listed):
        if number >= may_be_signatures and is_enough():
            return
        if number == LIMIT:
            failures.append(_too_many(digest, len(listed)))
            return
        try:
            if bundle := _bundle(source, descriptor, digest, limits):
                yield bundle
        except (FormatError, IntegrityError, NotFoundError):
            continue
        except (RegistryError, CredentialsError) as error:
            failures.append(error)


def _bundle(source: Blobs, descriptor: Descriptor, digest: Digest, limits: Limits) -> Bundle | None:
    """Read an attachment; None if it is not a bundle about this image."""
    manifest = _manifest(source, descriptor, limits)
    if manifest.inner("subject").text("digest") != digest:
        return None
    layers = manifest.list_of("layers", Descriptor.from_json, at_most=1)
    if [layer.media_type for layer in layers] != [bundles.MEDIA_TYPE]:
        return None
    return Bundle.parse(source.read(layers[0], limit_bytes=bundles.LIMIT_BYTES))


def find_simple(
    source: Blobs, descriptor: Descriptor, limits: Limits, failures: list[RekindleError]
) -> Iterator[SimpleSignature]:
    """Yield the signatures in the image under cosign's tag, not verified, the newest first; see `find`."""
    name = media_types.SIGNATURE_ANNOTATION

    def may_be_one(layer: Descriptor) -> bool:
        return layer.media_type == bundles.SIMPLE_MEDIA_TYPE and bool(layer.annotations.get(name))

    for layer, payload in _older(source, descriptor, limits, failures, may_be_one):
        with contextlib.suppress(FormatError):
            names = (name, _CERTIFICATE, _CHAIN, _ENTRY)
            signature, *more = (layer.annotations.get(name, "") for name in names)
            yield SimpleSignature.of(payload, signature, *more)


def find_older_attestations(
    source: Blobs, descriptor: Descriptor, limits: Limits, failures: list[RekindleError]
) -> Iterator[OlderAttestation]:
    """Yield what says how a snapshot was made, of the image under cosign's tag; see `find_simple`."""

    def may_be_one(layer: Descriptor) -> bool:
        kind = layer.annotations.get(_KIND)
        return layer.media_type == media_types.ENVELOPE and kind == media_types.SNAPSHOT_PREDICATE

    for layer, content in _older(source, descriptor, limits, failures, may_be_one):
        with contextlib.suppress(FormatError):
            more = (layer.annotations.get(name, "") for name in (_CERTIFICATE, _CHAIN))
            yield OlderAttestation.parse(content, *more)


def _older(
    source: Blobs,
    descriptor: Descriptor,
    limits: Limits,
    failures: list[RekindleError],
    may_be_one: Callable[[Descriptor], bool],
) -> Iterator[tuple[Descriptor, bytes]]:
    """Yield some layers of an image under one of cosign's tags, and their content, the newest first."""
    layers: list[Descriptor] = []
    with contextlib.suppress(FormatError, IntegrityError, NotFoundError):
        content = source.read(descriptor, limit_bytes=limits.manifest_bytes)
        layers = readable(cosign_tags.layers(content))
    wanted = [layer for layer in reversed(layers) if may_be_one(layer)]
    for layer in wanted[:LIMIT]:
        with contextlib.suppress(FormatError, IntegrityError, NotFoundError):
            yield layer, source.read(layer, limit_bytes=bundles.LIMIT_BYTES)
    if len(wanted) > LIMIT:
        failures.append(_too_many(descriptor.digest, len(wanted)))


def _too_many(digest: Digest, count: int) -> FormatError:
    return FormatError(
        f"{digest} has too many attachments to look for a signature",
        cause=f"{count} may be signatures; the first {LIMIT} were read",
    )


def store(layout: Layout, subject: Descriptor, bundle: Bundle, predicate_type: str) -> Descriptor:
    """Write a bundle and its manifest into a layout; return the manifest's descriptor."""
    layer = layout.put(bundle.content, bundles.MEDIA_TYPE)
    config = layout.put(b"{}", media_types.EMPTY)
    manifest: Mapping[str, JSON] = {
        "schemaVersion": 2,
        "mediaType": media_types.MANIFEST,
        "artifactType": bundles.MEDIA_TYPE,
        "config": config.to_json(),
        "layers": [layer.to_json()],
        "subject": {"mediaType": subject.media_type, "digest": subject.digest, "size": subject.size},
        "annotations": {
            "dev.sigstore.bundle.content": "dsse-envelope",
            media_types.PREDICATE: predicate_type,
            "org.opencontainers.image.created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        },
    }
    put = layout.put(json.dumps(manifest).encode(), media_types.MANIFEST, artifact_type=bundles.MEDIA_TYPE)
    return structs.replace(put, annotations={media_types.PREDICATE: predicate_type})


def store_simple(layout: Layout, signatures: Sequence[SimpleSignature]) -> Descriptor:
    """Write older signatures in cosign's form of an image; return the manifest's descriptor."""
    from base64 import b64encode

    layers = []
    for each in signatures:
        annotations = {
            media_types.SIGNATURE_ANNOTATION: b64encode(each.signature).decode(),
            **_certified(each),
        }
        layers.append(_layer(layout, each.payload, bundles.SIMPLE_MEDIA_TYPE, annotations))
    return _store_layers(layout, layers)


def store_envelope(layout: Layout, bundle: Bundle, predicate_type: str, by: SimpleSignature) -> Descriptor:
    """Write the attestation in a bundle in cosign's older form; return the manifest's descriptor.

    `by` is a signature by the same key, whose certificate is stored with it.
    """
    content = json.dumps(bundle.envelope.to_json()).encode()
    annotations = {media_types.SIGNATURE_ANNOTATION: "", _KIND: predicate_type, **_certified(by)}
    return _store_layers(layout, [_layer(layout, content, media_types.ENVELOPE, annotations)])


def _certified(signature: SimpleSignature) -> dict[str, str]:
    if not signature.certificate:
        return {}
    return {_CERTIFICATE: signature.certificate.decode(), _CHAIN: signature.above.decode()}


def _layer(layout: Layout, content: bytes, media_type: str, annotations: Mapping[str, str]) -> JSON:
    return {**layout.put(content, media_type).to_json(), "annotations": dict(annotations)}


def _store_layers(layout: Layout, layers: Sequence[JSON]) -> Descriptor:
    config, manifest = cosign_tags.image_of(layers)
    layout.put(config, media_types.IMAGE_CONFIG)
    return layout.put(manifest, media_types.MANIFEST)


def _manifest(source: Blobs, descriptor: Descriptor, limits: Limits) -> Fields:
    content = source.read(descriptor, limit_bytes=limits.manifest_bytes)
    return Fields.parse(content, "manifest", limit_bytes=limits.manifest_bytes)
