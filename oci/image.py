# SPDX-License-Identifier: Apache-2.0
"""A snapshot as an OCI image: an index, the process image's manifest, its record and its layers."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from oci import media_types
from oci.descriptor import Blobs, Descriptor
from oci.layout import MANIFEST_LIMIT_BYTES, Layout
from rekindle.errors import FormatError
from rekindle.fields import Fields
from rekindle.record import RECORD_LIMIT_BYTES, Record

_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
_MANIFESTS_LIMIT = 16
_LAYERS_LIMIT = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """A snapshot: its descriptors, its record once checked and parsed, and where its blobs are."""

    blobs: Blobs
    index: Descriptor
    process: Descriptor
    config: Descriptor
    layers: Sequence[Descriptor]
    record: Record

    @property
    def size_bytes(self) -> int:
        """The bytes of the process image: what is stored, and what a node that has nothing fetches."""
        return self.process.size + self.config.size + sum(layer.size for layer in self.layers)


def build(layout: Layout, record: Record, layers: Sequence[Descriptor]) -> Image:
    """Writes the record, the manifest and the index of a snapshot whose layers are there already."""
    config = layout.put(record.to_bytes(), media_types.RECORD)
    # Names of checkpointctl's where they mean the same; org.criu.checkpoint.container.name is not
    # set, since a kubelet would try to restore the image as a container.
    annotations = {
        "org.opencontainers.image.created": record.created,
        "org.criu.checkpoint.engine.name": "rekindle",
        "org.criu.checkpoint.engine.version": record.made_by,
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": media_types.MANIFEST,
        "artifactType": media_types.PROCESS,
        "config": config.to_json(),
        "layers": [layer.to_json() for layer in layers],
        "annotations": annotations,
    }
    process = layout.put(_serialize(manifest), media_types.MANIFEST, artifact_type=media_types.PROCESS)
    architecture = record.node.architecture
    platform = {"architecture": _ARCHITECTURES.get(architecture, architecture), "os": "linux"}
    index = {
        "schemaVersion": 2,
        "mediaType": media_types.INDEX,
        "artifactType": media_types.SNAPSHOT,
        "manifests": [{**process.to_json(), "platform": platform}],
        "annotations": {"org.opencontainers.image.created": record.created},
    }
    return Image(
        blobs=layout,
        index=layout.put(_serialize(index), media_types.INDEX, artifact_type=media_types.SNAPSHOT),
        process=process,
        config=config,
        layers=tuple(layers),
        record=record,
    )


def load(blobs: Blobs, descriptor: Descriptor) -> Image:
    """Reads index, manifest and record, each checked against its digest; no layer is touched.

    Raises IntegrityError for other bytes, FormatError for what is no snapshot or of a newer format.
    """
    index = Fields.parse(
        blobs.read(descriptor, limit_bytes=MANIFEST_LIMIT_BYTES),
        "index",
        limit_bytes=MANIFEST_LIMIT_BYTES,
    )
    kind = index.text("artifactType", "")
    if kind != media_types.SNAPSHOT:
        raise FormatError(
            f"{descriptor.digest} is no snapshot that this rekindle reads",
            cause=f"its artifactType is {kind!r:.80}, and not {media_types.SNAPSHOT!r}",
        )
    manifests = index.list_of("manifests", Descriptor.from_json, at_most=_MANIFESTS_LIMIT)
    processes = [d for d in manifests if d.artifact_type == media_types.PROCESS]
    if len(processes) != 1:
        raise FormatError(f"{descriptor.digest} names {len(processes)} process images and not one")
    (process,) = processes
    manifest = Fields.parse(
        blobs.read(process, limit_bytes=MANIFEST_LIMIT_BYTES),
        "manifest",
        limit_bytes=MANIFEST_LIMIT_BYTES,
    )
    if manifest.text("artifactType", "") != media_types.PROCESS:
        raise FormatError(f"{process.digest} is not the process image that the index calls it")
    config = Descriptor.from_json(manifest.json("config"), "manifest.config")
    layers = manifest.list_of("layers", Descriptor.from_json, at_most=_LAYERS_LIMIT)
    if config.media_type != media_types.RECORD or any(
        layer.media_type != media_types.DUMP_LAYER for layer in layers
    ):
        raise FormatError(
            f"{process.digest} has parts that this rekindle does not know", hint="use a newer rekindle"
        )
    return Image(
        blobs=blobs,
        index=descriptor,
        process=process,
        config=config,
        layers=tuple(layers),
        record=Record.parse(blobs.read(config, limit_bytes=RECORD_LIMIT_BYTES)),
    )


def _serialize(document: object) -> bytes:
    return json.dumps(document, indent=1).encode()
