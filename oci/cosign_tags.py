# SPDX-License-Identifier: Apache-2.0
"""The tags under which cosign before 2.6 stores what belongs to an image: signatures, attestations, an SBOM.

Under the tag `sha256-HEX.KIND` is an image, where HEX is of the digest of what it belongs to. Its layers are
signatures or attestations, to which others may add theirs, or one SBOM, which is replaced as a whole.
"""

import json
import re
from collections.abc import Sequence

from oci import media_types
from oci.descriptor import Descriptor, HeldBlob, readable
from oci.destination import Destination
from rekindle.digest import Digest
from rekindle.errors import FormatError, RegistryError
from rekindle.fields import JSON, Fields

SIGNATURES = "sig"
ATTESTATIONS = "att"
SBOM = "sbom"
KINDS = (SIGNATURES, ATTESTATIONS, SBOM)

_TAG = re.compile(r"sha256-([0-9a-f]{64})\.(sig|att|sbom)")
_LAYERS_LIMIT = 10_000
_WRITES_LIMIT = 10


def tag_of(digest: Digest, kind: str) -> str:
    """Return the tag of what belongs to a manifest."""
    return f"sha256-{digest.hex}.{kind}"


def subject_of(tag: str) -> Digest | None:
    """Return what is tagged so belongs to; None for any other tag."""
    match = _TAG.fullmatch(tag)
    return Digest.parse(f"sha256:{match[1]}") if match else None


def layers(content: bytes) -> list[JSON]:
    """Return the layers of such an image as its manifest lists them. Raises FormatError."""
    fields = Fields.parse(content, "manifest", limit_bytes=len(content))
    return fields.list_of("layers", lambda value, _: value, at_most=_LAYERS_LIMIT)


def put(target: Destination, tag: str, content: bytes, media_type: str) -> Digest:
    """Store an image whose blobs are in the target under its tag, with what others have there already.

    Return the digest that the tag names now. Others may add theirs at the same time, so the tag is read again
    after it was written, and in `Destination.settle`. Raises RegistryError if ours do not stay, FormatError
    if something else is under the tag, or another SBOM.
    """

    def add() -> tuple[Digest, bool]:
        return _add(target, tag, content, media_type)

    digest, had_to_write = add()
    if had_to_write:
        target.keep(tag, lambda: add()[1])
    return digest


def _add(target: Destination, tag: str, content: bytes, media_type: str) -> tuple[Digest, bool]:
    """Add what is missing under a tag; return the digest there, and whether anything had to be written."""
    ours = Digest.of_bytes(content)
    for number in range(_WRITES_LIMIT):
        there = target.tagged(tag)
        if there is None:
            target.put_manifest(content, media_type, tag)
            continue
        if there.digest == ours:
            return there.digest, number > 0
        if tag.endswith(f".{SBOM}"):
            raise FormatError(f"another SBOM is under {tag}", cause=f"{there.digest}, and not {ours}")
        known = layers(target.read(there, limit_bytes=there.size))
        marks = {_mark(layer) for layer in known}
        missing = [layer for layer in layers(content) if _mark(layer) not in marks]
        if not missing:
            return there.digest, number > 0
        config, manifest = image_of([*known, *missing])
        described = Descriptor(
            media_type=media_types.IMAGE_CONFIG, digest=Digest.of_bytes(config), size=len(config)
        )
        target.upload(described, HeldBlob(config))
        target.put_manifest(manifest, media_types.MANIFEST, tag)
    raise RegistryError(f"what was added under {tag} does not stay", cause="other clients replace it")


def _mark(layer: JSON) -> tuple[object, object]:
    """Return what tells one signature or attestation from another."""
    annotations = layer.get("annotations") if isinstance(layer, dict) else None
    signature = annotations.get(media_types.SIGNATURE_ANNOTATION) if isinstance(annotations, dict) else None
    return (layer.get("digest") if isinstance(layer, dict) else None), signature


def image_of(listed: Sequence[JSON]) -> tuple[bytes, bytes]:
    """Return the config and the manifest of an image of some layers, as cosign makes them."""
    config = json.dumps(
        {
            "architecture": "",
            "os": "",
            "config": {},
            "rootfs": {"type": "layers", "diff_ids": [each.digest for each in readable(listed)]},
        }
    ).encode()
    manifest = {
        "schemaVersion": 2,
        "mediaType": media_types.MANIFEST,
        "config": {
            "mediaType": media_types.IMAGE_CONFIG,
            "digest": Digest.of_bytes(config),
            "size": len(config),
        },
        "layers": list(listed),
    }
    return config, json.dumps(manifest).encode()
