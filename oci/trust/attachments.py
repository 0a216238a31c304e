# SPDX-License-Identifier: Apache-2.0
"""Find and store signatures: manifests that refer to the image, or the tag that cosign used before 2.6.

A bundle is the only layer of a manifest whose `subject` is the image (OCI image specification 1.1). An older
signature is a layer of the image under the tag `sha256-HEX.sig`, with the signature in an annotation.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime

from msgspec import structs

from oci import media_types
from oci.attached import simple_tag
from oci.descriptor import Blobs, Descriptor
from oci.layout import Layout
from oci.trust import bundle as bundles
from oci.trust.bundle import Bundle, SimpleSignature
from oci.trust.statement import COSIGN_SIGN, SNAPSHOT
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

__all__ = ["find", "find_simple", "simple_tag", "store", "store_simple"]

_CERTIFICATE = "dev.sigstore.cosign/certificate"
_CHAIN = "dev.sigstore.cosign/chain"
_ENTRY = "dev.sigstore.cosign/bundle"
_LIMIT = 500  # how many attachments of an image are read
_SIMPLE_LIMIT = 100
_OURS = frozenset({COSIGN_SIGN, SNAPSHOT})


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
    kinds = {each.digest: each.annotations.get(media_types.PREDICATE) for each in listed}
    listed = sorted(listed, key=lambda each: 0 if kinds[each.digest] in _OURS else 1)
    likely = [each for each in listed if kinds[each.digest] in {None, *_OURS}]
    others = [each for each in listed if kinds[each.digest] not in {None, *_OURS}]
    for number, descriptor in enumerate([*likely, *others]):
        if number >= len(likely) and is_enough():
            return
        if number == _LIMIT:
            failures.append(
                FormatError(
                    f"{digest} has too many attachments to look for a signature",
                    cause=f"{len(listed)} may be signatures; the first {_LIMIT} were read",
                )
            )
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


def find_simple(source: Blobs, descriptor: Descriptor, limits: Limits) -> Iterator[SimpleSignature]:
    """Yield the signatures in the image under cosign's tag, not verified; see `find`."""
    layers: list[Descriptor] = []
    with contextlib.suppress(FormatError, IntegrityError, NotFoundError):
        manifest = _manifest(source, descriptor, limits)
        layers = manifest.list_of("layers", Descriptor.from_json, at_most=_SIMPLE_LIMIT)
    for layer in layers:
        signature = layer.annotations.get(media_types.SIGNATURE_ANNOTATION)
        if layer.media_type == bundles.SIMPLE_MEDIA_TYPE and signature:
            with contextlib.suppress(FormatError, IntegrityError, NotFoundError):
                payload = source.read(layer, limit_bytes=bundles.LIMIT_BYTES)
                texts = (layer.annotations.get(name, "") for name in (_CERTIFICATE, _CHAIN, _ENTRY))
                yield SimpleSignature.of(payload, signature, *texts)


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
        layer = layout.put(each.payload, bundles.SIMPLE_MEDIA_TYPE).to_json()
        annotations = {media_types.SIGNATURE_ANNOTATION: b64encode(each.signature).decode()}
        if each.certificate:
            annotations |= {_CERTIFICATE: each.certificate.decode(), _CHAIN: each.above.decode()}
        layers.append({**layer, "annotations": annotations})
    config: Mapping[str, JSON] = {
        "architecture": "",
        "os": "",
        "config": {},
        "rootfs": {"type": "layers", "diff_ids": [layer["digest"] for layer in layers]},
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": media_types.MANIFEST,
        "config": layout.put(json.dumps(config).encode(), media_types.IMAGE_CONFIG).to_json(),
        "layers": layers,
    }
    return layout.put(json.dumps(manifest).encode(), media_types.MANIFEST)


def _manifest(source: Blobs, descriptor: Descriptor, limits: Limits) -> Fields:
    content = source.read(descriptor, limit_bytes=limits.manifest_bytes)
    return Fields.parse(content, "manifest", limit_bytes=limits.manifest_bytes)
