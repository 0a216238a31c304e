# SPDX-License-Identifier: Apache-2.0
"""Kernel caches that Model Cache Vault (MCV) packed: images without our inventory, but with MCV's labels.

    manifest    of OCI or Docker
    layer       one, of tar and gzip: io.vllm.cache/… or io.triton.cache/…, and MCV's manifest.json

Written after MCV's `docs/spec-compat.md` and `pkg/cacheplan` (repository redhat-et/GKM). Other trees that
were captured with a cache of vLLM are directories in it, named by the label `io.kserve.km/cache-mounts`.
"""

import json
from collections.abc import Mapping

from msgspec import Struct

from oci.cache.inventory import Entry, Inventory, StoredRoot, Target, json_object
from oci.descriptor import Descriptor
from rekindle import documents
from rekindle.engine.caches import VARIABLES, CacheKind, path_of
from rekindle.errors import FormatError

_MOUNTS_LIMIT = 64
_TARGETS_LIMIT = 64


class ForeignCache(Struct, frozen=True, kw_only=True):
    """A cache by its labels: as an inventory of one root, with the caches in directories of that.

    The root's number of files is unknown, 0. `inner` has the directory of each by its variable.
    """

    inventory: Inventory
    inner: Mapping[str, str]


def read(labels: Mapping[str, str], layer: Descriptor, own: Mapping[str, str]) -> ForeignCache | None:
    """Return what MCV's labels tell of an image, or None if it has none. Raises FormatError.

    The recorded place is that of the label, else where a server with the environment `own` would look.
    """
    for kind in (CacheKind.TRITON, CacheKind.VLLM):  # in the order of MCV
        base = f"cache.{kind}.image"
        if f"{base}/summary" in labels:
            break
    else:
        return None
    size = labels.get(f"{base}/cache-size-bytes", "0")
    if not size.isdecimal() or len(size) > 15:
        raise FormatError("the size in the labels of the cache is no number", cause=f"{size!r:.80}")
    variable, _, recorded = labels.get("io.kserve.km/cache-root-env", "").partition("=")
    if variable != VARIABLES[kind]:
        recorded = path_of(kind, own)
    root = StoredRoot(
        kind=kind,
        recorded=recorded.partition(",")[0],
        prefix=f"io.{kind}.cache",
        layer=0,
        files=0,
        bytes=int(size),
        entries=[
            Entry(
                key="*",
                targets=_targets(labels[f"{base}/summary"]),
                files=0,
                bytes=int(size),
                digest=layer.digest,
            )
        ],
    )
    inventory = Inventory(made_by="MCV", roots=[root])
    return ForeignCache(inventory=inventory, inner=_inner(labels.get("io.kserve.km/cache-mounts", "")))


def _targets(summary: str) -> list[Target]:
    """Return the hardware that MCV's summary names, without that which it does not know either."""
    document = json_object(summary.encode(errors="replace")) or {}
    given = document.get("targets")
    found = documents.read(given if isinstance(given, list) else [], list[Target], "summary")
    return sorted({target for target in found[:_TARGETS_LIMIT] if target.arch not in {"", "unknown"}})


def _inner(mounts: str) -> dict[str, str]:
    """Return the directories within the cache that a variable points to; others are of no use to a server."""
    try:
        given = json.loads(mounts or "[]")
    except (ValueError, RecursionError) as error:
        raise FormatError(
            "the cache-mounts in the labels of the cache are malformed", cause=str(error)
        ) from None
    found: dict[str, str] = {}
    for mount in (given if isinstance(given, list) else [])[:_MOUNTS_LIMIT]:
        if isinstance(mount, dict) and mount.get("env") in VARIABLES.values():
            name = mount.get("subPath")
            if not isinstance(name, str) or not name or "/" in name or name in {".", ".."}:
                raise FormatError(
                    "the cache-mounts name a directory that cannot be used", cause=f"{name!r:.80}"
                )
            found[mount["env"]] = name
    return found
