# SPDX-License-Identifier: Apache-2.0
"""A kernel cache as an ordinary OCI image, in the form that MCV and KServe read.

    manifest    application/vnd.oci.image.manifest.v1+json
    config      application/vnd.oci.image.config.v1+json, with MCV's labels and our inventory
    layers      application/vnd.oci.image.layer.v1.tar+gzip, one for each cache, the one that MCV reads last

The place of a cache in its layer depends on the others (docs/adr/0005-kernel-cache-image.md):

    with a cache of vLLM        io.vllm.cache/…, and the others below io.vllm.cache/KIND/…
    with one of Triton          io.triton.cache/…, and the others below io.rekindle.cache/KIND/…
    else                        io.rekindle.cache/KIND/…
"""

import os
from collections.abc import Mapping, Sequence
from typing import Self

from msgspec import Struct, structs

from oci import media_types
from oci.cache import foreign
from oci.cache.inventory import (
    FIELD,
    Inventory,
)
from oci.descriptor import Blobs, Descriptor, cache_among, manifests_of
from rekindle.config import Limits
from rekindle.digest import Digest
from rekindle.errors import FormatError, NotFoundError
from rekindle.fields import Fields, text_item

_LABELS_LIMIT = 1000


class CacheImage(Struct, frozen=True, kw_only=True):
    """A kernel cache: its descriptors and its parsed config. No layer was fetched.

    One that MCV made has no inventory of ours (`counted`): the one here was made of its labels, and `inner`
    has the variables of the caches within, with their directories (`oci.cache.foreign`).
    """

    blobs: Blobs
    manifest: Descriptor
    config: Descriptor
    layers: Sequence[Descriptor]
    diff_ids: Sequence[Digest]
    labels: Mapping[str, str]
    inventory: Inventory
    created: str
    architecture: str
    counted: bool = True
    inner: Mapping[str, str] = {}

    def fetched_from(self, blobs: Blobs) -> Self:
        """Return the same image with its layers fetched from elsewhere."""
        return structs.replace(self, blobs=blobs)

    @property
    def size_bytes(self) -> int:
        """The size of the image: what is stored, and what a node without any of it fetches."""
        return self.manifest.size + self.config.size + sum(layer.size for layer in self.layers)


def find(blobs: Blobs, descriptor: Descriptor, limits: Limits) -> Descriptor:
    """Return the manifest of a cache: `descriptor` itself, or the cache of a snapshot if that is its index.

    Raises NotFoundError for a snapshot without a cache.
    """
    if descriptor.media_type != media_types.INDEX:
        return descriptor
    index = Fields.parse(
        blobs.read(descriptor, limit_bytes=limits.manifest_bytes), "index", limit_bytes=limits.manifest_bytes
    )
    cache = cache_among(manifests_of(index), descriptor.digest)
    if cache is None:
        raise NotFoundError(f"{descriptor.digest} has no kernel cache")
    return cache


def load(blobs: Blobs, descriptor: Descriptor, limits: Limits) -> CacheImage:
    """Read manifest and config of a cache, each checked against its digest. No layer is fetched.

    Raises IntegrityError if bytes do not match their digest, FormatError if this is not a cache image of ours
    or MCV's.
    """
    where = f"{descriptor.digest}"
    if descriptor.media_type not in media_types.IMAGE_MANIFESTS:
        raise FormatError(f"{where} is not a cache image", cause=f"its type is {descriptor.media_type!r:.80}")
    content = blobs.read(descriptor, limit_bytes=limits.manifest_bytes)
    manifest = Fields.parse(content, "manifest", limit_bytes=limits.manifest_bytes)
    config = Descriptor.from_json(manifest.json("config"), "manifest.config")
    layers = manifest.list_of("layers", Descriptor.from_json, at_most=limits.layers)
    if config.media_type not in media_types.IMAGE_CONFIGS:
        raise FormatError(f"{where} is not a cache image", cause=f"its config is {config.media_type!r:.80}")
    for layer in layers:
        if layer.media_type not in media_types.TAR_GZIP_LAYERS:
            raise FormatError(f"{where} has a layer of an unknown type", cause=f"{layer.media_type!r:.80}")
    document = Fields.parse(
        blobs.read(config, limit_bytes=limits.record_bytes), "config", limit_bytes=limits.record_bytes
    )
    diff_ids = document.inner("rootfs").list_of("diff_ids", _digest, at_most=limits.layers)
    if len(diff_ids) != len(layers):
        raise FormatError(f"{where} has {len(layers)} layers and {len(diff_ids)} digests of their content")
    settings = document.inner("config") if document.has("config") else Fields({}, "config")
    labels = settings.text_map("Labels", {})
    if len(labels) > _LABELS_LIMIT:
        raise FormatError(f"{where} has {len(labels)} labels")
    counted, inner = document.has(FIELD), dict[str, str]()
    if counted:
        inventory = Inventory.from_json(document.json(FIELD))
    else:
        foreign_cache = foreign.read(labels, layers[0], os.environ) if len(layers) == 1 else None
        if foreign_cache is None:
            raise FormatError(
                f"{where} is no cache image by rekindle, nor one by MCV in a single layer",
                hint="`mcv --extract` extracts images that older versions of MCV made",
            )
        inventory, inner = foreign_cache.inventory, dict(foreign_cache.inner)
    if any(root.layer >= len(layers) for root in inventory.roots):
        raise FormatError(f"the inventory of {where} names a layer that does not exist")
    return CacheImage(
        blobs=blobs,
        manifest=descriptor,
        config=config,
        layers=tuple(layers),
        diff_ids=tuple(diff_ids),
        labels=labels,
        inventory=inventory,
        created=document.text("created", ""),
        architecture=document.text("architecture"),
        counted=counted,
        inner=inner,
    )


def _digest(value: object, where: str) -> Digest:
    try:
        return Digest.parse(text_item(value, where))
    except ValueError as error:
        raise FormatError(f"{where} cannot be used", cause=str(error)) from None
