# SPDX-License-Identifier: Apache-2.0
"""A snapshot's index and manifests, as other tools read them."""

import json
from pathlib import Path
from typing import Any

from msgspec import structs

from oci import image as images
from oci import media_types
from oci.cache import pack
from oci.descriptor import Descriptor
from oci.layout import Layout
from tests.samples.cache import CREATED, triton
from tests.samples.record import RECORD


def built(place: Path, *, cache: bool) -> tuple[Layout, images.Image]:
    layout = Layout.create(place / "layout")
    layers = [
        structs.replace(
            layout.put(f"{number} {role}".encode(), media_types.DUMP_LAYER),
            annotations={media_types.ROLE: role},
        )
        for number, role in enumerate(("metadata", "memory", "memory", "shm"))
    ]
    kernels = pack.pack([triton(place / "t")], layout, created=CREATED) if cache else None
    return layout, images.build(layout, RECORD, layers, kernels)


def document(layout: Layout, descriptor: Descriptor) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(layout.read(descriptor, limit_bytes=1 << 20))
    return content


def test_other_tools_take_the_cache_and_never_the_process(tmp_path: Path) -> None:
    """They take the first that is for their platform; so do all that are made of go-containerregistry."""
    layout, image = built(tmp_path, cache=True)
    cache, process = document(layout, image.index)["manifests"]
    assert cache["annotations"] == {media_types.ROLE: media_types.CACHE_ROLE}
    assert cache["platform"] == {"architecture": "amd64", "os": "linux"}
    assert process["artifactType"] == media_types.PROCESS
    assert process["platform"] == {"architecture": "unknown", "os": "unknown"}
    again = images.load(layout, image.index)
    assert (again.process.digest, again.cache and again.cache.digest) == (process["digest"], cache["digest"])
    assert again.layers == image.layers


def test_each_layer_has_a_name_of_its_own(tmp_path: Path) -> None:
    """`oras pull` leaves out what has none, and overwrites one file with another of the same name."""
    layout, image = built(tmp_path, cache=True)
    assert image.cache is not None
    both = [document(layout, each)["layers"] for each in (image.process, image.cache)]
    names = [layer["annotations"][media_types.TITLE] for layers in both for layer in layers]
    roles = [name.partition("-")[0] for name in names]
    assert roles == ["metadata", "memory", "memory", "shm", "triton.tar.gz"]
    assert len(set(names)) == len(names)
    shared = images.build(layout, RECORD, [*image.layers[1:], image.layers[0]])
    assert sorted(map(str, shared.layers)) == sorted(map(str, image.layers)), (
        "a layer is called the same in a delta that shares it"
    )
    assert len(document(layout, shared.index)["manifests"]) == 1
