# SPDX-License-Identifier: Apache-2.0
"""Write docs/schemas/ from the types of our documents; with --check, fail if a file differs."""

import inspect
import json
import sys
from pathlib import PurePosixPath

import msgspec

from hack.docs import pages
from oci.cache.inventory import Inventory
from rekindle.digest import Digest
from rekindle.fields import JSON
from rekindle.record import SCHEMA, SCHEMA_DELTA, SCHEMA_WITHOUT_MEMORY, Record

DOCUMENTS = {"record": Record, "inventory": Inventory}
_TEXTS: dict[type, dict[str, JSON]] = {
    PurePosixPath: {"type": "string"},
    Digest: {"type": "string", "pattern": "^sha256:[0-9a-f]{64}$"},
}


def schema(kind: type) -> dict[str, JSON]:
    """Return the JSON schema of a document: what `rekindle` accepts is valid."""
    made = msgspec.json.schema(kind, schema_hook=_TEXTS.__getitem__)
    parts = made["$defs"]
    for part in parts.values():
        part["description"] = inspect.cleandoc(part["description"])
    if kind is Record:
        parts["Record"]["properties"]["schema"]["enum"] = [SCHEMA_WITHOUT_MEMORY, SCHEMA, SCHEMA_DELTA]
        node = parts["Fingerprint"]
        # A node's GPUs stand beside its other fields.
        del node["properties"]["devices"]
        gpus = parts.pop("Gpus")["properties"]
        del gpus["gpu_problem"]
        node["properties"] |= {**gpus, "cpu_level": {"description": "For people; it is not read."}}
        del node["properties"]["cpu_features"]["uniqueItems"]  # a name that stands there twice counts once
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **made}


def main() -> int:
    """Write or check every file."""
    texts = {name: json.dumps(schema(kind), indent=2) + "\n" for name, kind in DOCUMENTS.items()}
    return max(pages.finish(f"schemas/{name}.json", text) for name, text in texts.items())


if __name__ == "__main__":
    sys.exit(main())
