# SPDX-License-Identifier: Apache-2.0
"""An image that is nothing but layers, to be copied, pushed and pulled."""

import json
import os
from pathlib import Path

from oci import media_types
from oci.layout import Layout
from rekindle.digest import Digest

LAYERS = 12
LAYER_BYTES = 1_000_000


def make_image(directory: Path, *, layers: int = LAYERS, size: int = LAYER_BYTES) -> Digest:
    """An image of random layers in an OCI layout, as `oci:DIRECTORY:1`."""
    layout = Layout.create(directory)
    config = layout.put(b"{}", "application/vnd.oci.empty.v1+json")
    parts = [layout.put(os.urandom(size), media_types.DUMP_LAYER) for _ in range(layers)]
    manifest = {
        "schemaVersion": 2,
        "mediaType": media_types.MANIFEST,
        "artifactType": "application/vnd.example",
        "config": config.to_json(),
        "layers": [part.to_json() for part in parts],
    }
    root = layout.put(json.dumps(manifest).encode(), media_types.MANIFEST)
    layout.publish(layout, root, "1")
    return root.digest
