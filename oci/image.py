# SPDX-License-Identifier: Apache-2.0
"""A snapshot as an OCI image: an index, the process image's manifest, its record and its layers."""

import json
from collections.abc import Sequence
from typing import Self

from msgspec import Struct, structs

from oci import media_types
from oci.descriptor import Blobs, Descriptor, cache_among, manifests_of, platform_of
from oci.layout import Layout
from rekindle.config import Limits
from rekindle.errors import FormatError, RekindleError
from rekindle.fields import JSON, Fields
from rekindle.record import Record

_DEFAULTS = Limits()
# As BuildKit marks attestations, which no container is made of either.
_NO_PLATFORM = {"architecture": "unknown", "os": "unknown"}
_CACHE_HINT = "it is a kernel cache without a process: use `rekindle extract`"


class Image(Struct, frozen=True, kw_only=True):
    """A snapshot: its descriptors, its parsed record, and where to read its blobs.

    `limits` also apply to its layers when they are read.
    """

    blobs: Blobs
    limits: Limits
    index: Descriptor
    process: Descriptor
    config: Descriptor
    layers: Sequence[Descriptor]
    cache: Descriptor | None
    record: Record
    neutral: Descriptor | None = None

    def fetched_from(self, blobs: Blobs) -> Self:
        """Return the same image with its layers fetched from elsewhere."""
        return structs.replace(self, blobs=blobs)

    def to_json(self) -> dict[str, JSON]:
        """Return the image without its blobs, for another process of this machine; `from_json` reads it."""
        return {
            "index": self.index.to_json(),
            "process": self.process.to_json(),
            "config": self.config.to_json(),
            "layers": [layer.to_json() for layer in self.layers],
            "cache": self.cache.to_json() if self.cache else None,
            "neutral": self.neutral.to_json() if self.neutral else None,
            "record": self.record.to_bytes().decode(),
        }

    @classmethod
    def from_json(cls, value: object, blobs: Blobs) -> "Image":
        """Read an image whose blobs, as far as they are still there, are in `blobs`. Raises FormatError."""
        fields = Fields(value, "image")
        cache = fields.json("cache")
        neutral = fields.json("neutral") if fields.has("neutral") else None
        return cls(
            blobs=blobs,
            limits=_DEFAULTS,
            index=Descriptor.from_json(fields.json("index"), "image.index"),
            process=Descriptor.from_json(fields.json("process"), "image.process"),
            config=Descriptor.from_json(fields.json("config"), "image.config"),
            layers=tuple(fields.list_of("layers", Descriptor.from_json, at_most=_DEFAULTS.layers)),
            cache=Descriptor.from_json(cache, "image.cache") if cache else None,
            record=Record.parse(fields.text("record").encode()),
            neutral=Descriptor.from_json(neutral, "image.neutral") if neutral else None,
        )

    @property
    def size_bytes(self) -> int:
        """The size of the process image: what is stored, and what a node without any of it fetches."""
        return self.process.size + self.config.size + sum(layer.size for layer in self.layers)


def build(
    layout: Layout,
    record: Record,
    layers: Sequence[Descriptor],
    cache: Descriptor | None = None,
    neutral: Descriptor | None = None,
) -> Image:
    """Write the record, the manifest and the index of a snapshot whose layers are in the layout already.

    `cache` is the manifest of the kernel cache's image. Other tools, such as crane, skopeo and MCV, take the
    first manifest of an index that is for their platform. So that is the cache; and the process, which they
    cannot use, is for none.
    """
    process, config, layers = _put_process(layout, record, layers, media_types.PROCESS)
    manifests = [{**process.to_json(), "platform": _NO_PLATFORM}]
    if neutral is not None:
        manifests.append({**neutral.to_json(), "platform": _NO_PLATFORM})
    if cache is not None:
        annotations = {**cache.annotations, media_types.ROLE: media_types.CACHE_ROLE}
        platform = platform_of(record.node.architecture)
        named = structs.replace(cache, annotations=annotations, platform=platform)
        manifests.insert(0, named.to_json())
    index = {
        "schemaVersion": 2,
        "mediaType": media_types.INDEX,
        "artifactType": media_types.SNAPSHOT,
        "manifests": manifests,
        "annotations": {"org.opencontainers.image.created": record.created},
    }
    return Image(
        blobs=layout,
        limits=_DEFAULTS,
        index=layout.put(_serialize(index), media_types.INDEX, artifact_type=media_types.SNAPSHOT),
        process=process,
        config=config,
        layers=tuple(layers),
        cache=cache,
        record=record,
        neutral=neutral,
    )


def put_neutral(layout: Layout, record: Record, layers: Sequence[Descriptor]) -> Descriptor:
    """Write record and manifest of a neutral process whose layers are in the layout already."""
    return _put_process(layout, record, layers, media_types.NEUTRAL)[0]


def _put_process(
    layout: Layout, record: Record, layers: Sequence[Descriptor], kind: str
) -> tuple[Descriptor, Descriptor, Sequence[Descriptor]]:
    """Write record and manifest of a process; return their descriptors, and the layers with their titles."""
    layers = [
        structs.replace(layer, annotations={**layer.annotations, media_types.TITLE: _title(layer)})
        for layer in layers
    ]
    config = structs.replace(
        layout.put(record.to_bytes(), media_types.RECORD), annotations={media_types.TITLE: "record.json"}
    )
    # checkpointctl's names where they mean the same. org.criu.checkpoint.container.name is not set, since a
    # kubelet would try to restore the image as a container.
    annotations = {
        "org.opencontainers.image.created": record.created,
        "org.criu.checkpoint.engine.name": "rekindle",
        "org.criu.checkpoint.engine.version": record.made_by,
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": media_types.MANIFEST,
        "artifactType": kind,
        "config": config.to_json(),
        "layers": [layer.to_json() for layer in layers],
        "annotations": annotations,
    }
    process = layout.put(_serialize(manifest), media_types.MANIFEST, artifact_type=kind)
    return process, config, layers


def load(blobs: Blobs, descriptor: Descriptor, limits: Limits = _DEFAULTS) -> Image:
    """Read index, manifest and record, each checked against its digest. No layer is fetched.

    Raises IntegrityError if bytes do not match their digest, FormatError if this is not a snapshot or has a
    newer format.
    """
    index = Fields.parse(
        blobs.read(descriptor, limit_bytes=limits.manifest_bytes),
        "index",
        limit_bytes=limits.manifest_bytes,
    )
    kind = index.text("artifactType", "")
    if kind != media_types.SNAPSHOT:
        raise FormatError(
            f"{descriptor.digest} is not a snapshot, or its format is newer than this rekindle",
            cause=f"its artifactType is {kind!r:.80} instead of {media_types.SNAPSHOT!r}",
            hint=_CACHE_HINT if _is_cache(blobs, descriptor, limits) else "",
        )
    manifests = manifests_of(index)
    processes = [d for d in manifests if d.artifact_type == media_types.PROCESS]
    if len(processes) != 1:
        raise FormatError(f"{descriptor.digest} lists {len(processes)} process images instead of one")
    (process,) = processes
    cache = cache_among(manifests, descriptor.digest)
    neutral = next((d for d in manifests if d.artifact_type == media_types.NEUTRAL), None)
    config, layers, record = _read_process(blobs, process, limits, media_types.PROCESS)
    return Image(
        blobs=blobs,
        limits=limits,
        index=descriptor,
        process=process,
        config=config,
        layers=layers,
        cache=cache,
        record=record,
        neutral=neutral,
    )


def load_neutral(image: Image) -> Image:
    """Return the image of the neutral process of a snapshot that has one. No layer is fetched."""
    assert image.neutral is not None
    config, layers, record = _read_process(image.blobs, image.neutral, image.limits, media_types.NEUTRAL)
    if record.neutral is None:
        raise FormatError(f"{image.neutral.digest} is not a neutral process, although the index says so")
    return structs.replace(image, process=image.neutral, config=config, layers=layers, record=record)


def _read_process(
    blobs: Blobs, process: Descriptor, limits: Limits, kind: str
) -> tuple[Descriptor, tuple[Descriptor, ...], Record]:
    """Read manifest and record of a process."""
    manifest = Fields.parse(
        blobs.read(process, limit_bytes=limits.manifest_bytes),
        "manifest",
        limit_bytes=limits.manifest_bytes,
    )
    if manifest.text("artifactType", "") != kind:
        raise FormatError(f"{process.digest} is not a process image, although the index says so")
    config = Descriptor.from_json(manifest.json("config"), "manifest.config")
    given = manifest.json("layers")
    if isinstance(given, list) and len(given) > limits.layers:
        raise FormatError(
            f"{process.digest} has {len(given)} layers; the limit is {limits.layers}",
            hint="the configuration sets it: `layers` in [limits], see docs/operations.md",
        )
    layers = manifest.list_of("layers", Descriptor.from_json, at_most=limits.layers)
    if config.media_type != media_types.RECORD or any(
        layer.media_type != media_types.DUMP_LAYER for layer in layers
    ):
        raise FormatError(f"{process.digest} has parts of an unknown type", hint="use a newer rekindle")
    record = Record.parse(
        blobs.read(config, limit_bytes=limits.record_bytes), limit_bytes=limits.record_bytes
    )
    return config, tuple(layers), record


def _title(layer: Descriptor) -> str:
    """Return the name of the file that `oras pull` makes of a layer; without one, it leaves the layer out.

    It is the same in every image that shares the layer.
    """
    return f"{layer.annotations.get(media_types.ROLE, 'dump')}-{layer.digest.hex[:12]}.zst"


def _is_cache(blobs: Blobs, descriptor: Descriptor, limits: Limits) -> bool:
    """Tell whether an image that is not a snapshot is a kernel cache."""
    if descriptor.media_type not in media_types.IMAGE_MANIFESTS:
        return False
    from oci.cache import image as cache_image

    try:
        cache_image.load(blobs, descriptor, limits)
    except RekindleError:
        return False
    return True


def _serialize(document: object) -> bytes:
    return json.dumps(document, indent=1).encode()
