# SPDX-License-Identifier: Apache-2.0
"""Find and store signatures: manifests that refer to the image, or the tag that cosign used before 2.6.

A bundle is the only layer of a manifest whose `subject` is the image (OCI image specification 1.1). An older
signature is a layer of the image under the tag `sha256-HEX.sig`, with the signature in an annotation.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime

from oci import media_types
from oci.descriptor import Blobs, Descriptor
from oci.layout import Layout
from oci.trust import bundle as bundles
from oci.trust.bundle import Bundle, SimpleSignature
from rekindle.config import Limits
from rekindle.digest import Digest
from rekindle.errors import FormatError, IntegrityError, NotFoundError
from rekindle.fields import JSON, Fields

_EMPTY = "application/vnd.oci.empty.v1+json"
_IMAGE_CONFIG = media_types.IMAGE_CONFIG
_SIGNATURE = "dev.cosignproject.cosign/signature"
_LIMIT = 100  # how many attachments of an image are read


def find(source: Blobs, digest: Digest, limits: Limits) -> Iterator[Bundle]:
    """Yield the bundles that are attached to an image, not verified.

    Malformed ones and those of another image are skipped, since anyone may attach anything.
    """
    for descriptor in source.referrers(digest)[:_LIMIT]:
        # The descriptor's artifactType is no help: in cosign 3's fallback index it is the empty config's.
        with contextlib.suppress(FormatError, IntegrityError, NotFoundError):
            manifest = _manifest(source, descriptor, limits)
            if manifest.inner("subject").text("digest") != digest:
                continue
            layers = manifest.list_of("layers", Descriptor.from_json, at_most=1)
            if [layer.media_type for layer in layers] == [bundles.MEDIA_TYPE]:
                yield Bundle.parse(source.read(layers[0], limit_bytes=bundles.LIMIT_BYTES))


def find_simple(source: Blobs, descriptor: Descriptor, limits: Limits) -> Iterator[SimpleSignature]:
    """Yield the signatures in the image under cosign's tag, not verified; see `find`."""
    layers: list[Descriptor] = []
    with contextlib.suppress(FormatError, IntegrityError, NotFoundError):
        manifest = _manifest(source, descriptor, limits)
        layers = manifest.list_of("layers", Descriptor.from_json, at_most=_LIMIT)
    for layer in layers:
        signature = layer.annotations.get(_SIGNATURE)
        if layer.media_type == bundles.SIMPLE_MEDIA_TYPE and signature:
            with contextlib.suppress(FormatError, IntegrityError, NotFoundError):
                payload = source.read(layer, limit_bytes=bundles.LIMIT_BYTES)
                yield SimpleSignature.of(payload, signature)


def simple_tag(digest: Digest) -> str:
    """Return the tag under which cosign before 2.6 looks for the signatures of an image."""
    return f"sha256-{digest.hex}.sig"


def store(layout: Layout, subject: Descriptor, bundle: Bundle, predicate_type: str) -> Descriptor:
    """Write a bundle and its manifest into a layout; return the manifest's descriptor."""
    layer = layout.put(bundle.content, bundles.MEDIA_TYPE)
    config = layout.put(b"{}", _EMPTY)
    manifest: Mapping[str, JSON] = {
        "schemaVersion": 2,
        "mediaType": media_types.MANIFEST,
        "artifactType": bundles.MEDIA_TYPE,
        "config": config.to_json(),
        "layers": [layer.to_json()],
        "subject": {"mediaType": subject.media_type, "digest": subject.digest, "size": subject.size},
        "annotations": {
            "dev.sigstore.bundle.content": "dsse-envelope",
            "dev.sigstore.bundle.predicateType": predicate_type,
            "org.opencontainers.image.created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        },
    }
    return layout.put(json.dumps(manifest).encode(), media_types.MANIFEST, artifact_type=bundles.MEDIA_TYPE)


def store_simple(layout: Layout, signatures: Sequence[SimpleSignature]) -> Descriptor:
    """Write older signatures in cosign's form of an image; return the manifest's descriptor."""
    from base64 import b64encode

    layers = []
    for each in signatures:
        layer = layout.put(each.payload, bundles.SIMPLE_MEDIA_TYPE).to_json()
        layers.append({**layer, "annotations": {_SIGNATURE: b64encode(each.signature).decode()}})
    config: Mapping[str, JSON] = {
        "architecture": "",
        "os": "",
        "config": {},
        "rootfs": {"type": "layers", "diff_ids": [layer["digest"] for layer in layers]},
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": media_types.MANIFEST,
        "config": layout.put(json.dumps(config).encode(), _IMAGE_CONFIG).to_json(),
        "layers": layers,
    }
    return layout.put(json.dumps(manifest).encode(), media_types.MANIFEST)


def _manifest(source: Blobs, descriptor: Descriptor, limits: Limits) -> Fields:
    content = source.read(descriptor, limit_bytes=limits.manifest_bytes)
    return Fields.parse(content, "manifest", limit_bytes=limits.manifest_bytes)
