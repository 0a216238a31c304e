# SPDX-License-Identifier: Apache-2.0
"""The inventory of a kernel cache, by entry and hardware: a field of the cache image's config.

    "vnd.rekindle.inventory": {
      "schema": "rekindle.inventory/1", "made_by": "rekindle 0.1.0",
      "roots": [{
        "kind": "triton", "recorded": "/root/.triton/cache", "prefix": "io.vllm.cache/triton", "layer": 0,
        "files": 16, "bytes": 52100,
        "entries": [{
          "key": "XTN6…", "targets": [{"backend": "hip", "arch": "gfx942", "warp_size": 64}],
          "versions": {"triton": "3.9.0"}, "files": 8, "bytes": 26200, "digest": "sha256:…"}]}]}

`layer` is the index of the layer that holds the root, below the prefix. An entry's digest is the sha256 over
its files in the order of the archive: path within the root, a zero byte, size in decimal, a zero byte,
content. The key `*` stands for all entries of a root that has too many to list.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Annotated

from msgspec import Meta, Struct, structs

from rekindle import documents
from rekindle.digest import Digest
from rekindle.documents import Count, whole
from rekindle.engine.caches import CacheKind
from rekindle.errors import FormatError
from rekindle.fields import JSON, Fields

FIELD = "vnd.rekindle.inventory"
SCHEMA = "rekindle.inventory/1"

# containers/image, which skopeo and Podman use, reads configs of at most 4 MiB.
ENTRIES_LIMIT = 5000
ROOTS_LIMIT = 64
_TARGETS_LIMIT = 64
_VERSIONS_LIMIT = 16
_TEXT_LIMIT = 255
_PATH_LIMIT_BYTES = 2048  # below the directory that it goes to
METADATA_LIMIT_BYTES = 1 << 20  # of an entry's own JSON

_TRITON_KEY = re.compile(r"[A-Z2-7]{52}")
PREFIXES = ("io.vllm.cache", "io.triton.cache", "io.rekindle.cache")
_NAME = "[a-z0-9]+(-[a-z0-9]+)*"
_PREFIX = whole(rf"io\.(vllm|triton)\.cache(/{_NAME})?|io\.rekindle\.cache/{_NAME}")
_WARP_LIMIT = 1024
_Text = Annotated[str, Meta(max_length=_TEXT_LIMIT)]


class Target(Struct, frozen=True, kw_only=True, order=True):
    """The hardware that a kernel was compiled for: (`cuda`, `90`, 32) or (`hip`, `gfx942`, 64).

    C++ for the processor of the machine is (`cpu`, the architecture as `uname -m` prints it, 0).
    """

    backend: _Text
    arch: _Text
    warp_size: Annotated[int, Meta(ge=0, le=_WARP_LIMIT)]


class Entry(Struct, frozen=True, kw_only=True):
    """The files that a server looks up by one key."""

    key: _Text
    targets: Annotated[Sequence[Target], Meta(max_length=_TARGETS_LIMIT)]
    versions: Annotated[Mapping[_Text, _Text], Meta(max_length=_VERSIONS_LIMIT)] = {}
    files: Count
    bytes: Count
    digest: Digest


class StoredRoot(Struct, frozen=True, kw_only=True):
    """A cache in an image: the path where it was, and the layer and prefix where it is."""

    kind: CacheKind
    recorded: str
    prefix: Annotated[str, Meta(pattern=_PREFIX, max_length=_TEXT_LIMIT)]
    layer: Annotated[int, Meta(ge=0, le=ROOTS_LIMIT)]
    files: Count
    bytes: Count
    entries: Annotated[Sequence[Entry], Meta(max_length=ENTRIES_LIMIT + _TARGETS_LIMIT)]

    def __post_init__(self) -> None:
        """Require an absolute path in canonical form, short enough to have something below it.

        Its directory is named after its kind, so that `--to DIR` writes to no other than `DIR/KIND`.
        """
        if not re.fullmatch(rf"{self.kind}(-[0-9]+)?", self.name):
            raise FormatError(
                f"the inventory calls a {self.kind} cache by another name", cause=f"{self.name!r:.120}"
            )
        path = PurePosixPath(self.recorded)
        if (
            not path.is_absolute()
            or str(path) != self.recorded
            or self.recorded.startswith("//")
            or len(path.parts) < 2
            or ".." in path.parts
            or not self.recorded.isprintable()
            or len(self.recorded.encode(errors="replace")) > _PATH_LIMIT_BYTES
        ):
            raise FormatError(
                "the inventory names a directory that cannot be used", cause=f"{self.recorded!r:.120}"
            )

    @property
    def name(self) -> str:
        """The name of its directory when several are extracted together: `KIND`, `KIND-2`."""
        return self.prefix.partition("/")[2] or self.kind


class Inventory(Struct, frozen=True, kw_only=True, tag_field="schema", tag=SCHEMA):
    """The caches that an image holds. No two share a layer, a place or a name."""

    made_by: str
    roots: Annotated[Sequence[StoredRoot], Meta(max_length=ROOTS_LIMIT)]

    def __post_init__(self) -> None:
        for what in ("layer", "prefix", "recorded", "name"):
            if len({getattr(root, what) for root in self.roots}) != len(self.roots):
                raise FormatError(f"two roots of the inventory have the same {what}")

    @property
    def targets(self) -> list[Target]:
        """The hardware of all entries."""
        return sorted({target for root in self.roots for entry in root.entries for target in entry.targets})

    def to_json(self) -> dict[str, JSON]:
        """Return the field of the config."""
        return documents.to_json(self)

    @classmethod
    def from_json(cls, value: object) -> "Inventory":
        """Parse an inventory. Raises FormatError if it is malformed or of an unknown version."""
        schema = Fields(value, "inventory").text("schema")
        if schema != SCHEMA:
            raise FormatError(
                f"the inventory has the format {schema!r:.60}; this rekindle reads {SCHEMA!r}",
                hint="use a newer rekindle" if schema.startswith("rekindle.inventory/") else "",
            )
        return documents.read(value, cls, "inventory")


def depends_on(kind: CacheKind) -> tuple[str, ...]:
    """Return the packages whose versions are part of the keys of a kind of cache."""
    return {
        CacheKind.VLLM: ("vllm", "torch"),
        CacheKind.TRITON: ("triton",),
        CacheKind.INDUCTOR: ("torch",),
        CacheKind.FLASHINFER: ("flashinfer",),
        CacheKind.DEEP_GEMM: ("deep-gemm",),
        CacheKind.TORCH_EXTENSIONS: ("torch", "python"),
        CacheKind.CUDA: (),
    }[kind]


def bounded(entries: Sequence[Entry], at_most: int) -> list[Entry]:
    """Return the entries, or if there are too many, one for each combination of targets and versions."""
    if len(entries) <= at_most:
        return list(entries)
    groups: dict[tuple[tuple[Target, ...], tuple[tuple[str, str], ...]], list[Entry]] = {}
    for entry in entries:
        group = (tuple(entry.targets), tuple(sorted(entry.versions.items())))
        groups.setdefault(group, []).append(entry)
    return [
        structs.replace(
            first,
            key="*",
            files=sum(entry.files for entry in group),
            bytes=sum(entry.bytes for entry in group),
            digest=Digest.of_bytes("\n".join(entry.digest for entry in group).encode()),
        )
        for group in groups.values()
        if (first := group[0])
    ]


def entry_key(kind: CacheKind, path: PurePosixPath) -> str:
    """Return the key of the entry that a file belongs to; `.` for a file without a key."""
    parts = path.parts
    match kind:
        case CacheKind.TRITON:
            return parts[0] if len(parts) > 1 else "."
        case CacheKind.VLLM:
            if parts[0] != "torch_compile_cache" or len(parts) < 3:
                return parts[0] if len(parts) > 1 else "."
            depth = 3 if parts[1] == "torch_aot_compile" and len(parts) > 3 else 2
            return "/".join(parts[:depth])
        case CacheKind.INDUCTOR:
            depth = {"triton": 3, "fxgraph": 3, "aotautograd": 2}.get(parts[0], 0)
            return "/".join(parts[:depth]) if 0 < depth < len(parts) else "."
        case CacheKind.DEEP_GEMM:
            return "/".join(parts[:2]) if len(parts) > 2 else "."
        case CacheKind.FLASHINFER:
            return "/".join(parts[: 2 if parts[0].count(".") else 1]) if len(parts) > 2 else "."
        case CacheKind.TORCH_EXTENSIONS:
            return parts[0] if len(parts) > 1 else "."
        case CacheKind.CUDA:
            return "."


class Metadata(Struct):
    """Facts about an entry from its names and JSON files, gathered file by file."""

    targets: set[Target] = set()
    versions: dict[str, str] = {}

    def look_at_name(self, root: CacheKind, path: PurePosixPath, recorded: str, machine: str) -> None:
        """Learn from a file's path, for kinds whose directory names hold the target.

        Inductor's C++ kernels are for the processor they were compiled on. Triton's launchers are not: every
        processor of the architecture runs them.
        """
        if (
            root in {CacheKind.VLLM, CacheKind.INDUCTOR}
            and path.suffix == ".so"
            and not any(_TRITON_KEY.fullmatch(part) for part in path.parts)
        ):
            self.targets.add(Target(backend="cpu", arch=machine, warp_size=0))
        if root is CacheKind.FLASHINFER:
            for part in path.parts[:2]:
                if re.fullmatch(r"\d+\.\d+[\w.+]*", part):
                    self.versions["flashinfer"] = part
                elif re.fullmatch(r"\d{2,3}[a-z]?(_\d{2,3}[a-z]?)*", part):
                    self.targets |= {
                        Target(backend="cuda", arch=arch, warp_size=32) for arch in part.split("_")
                    }
        elif root is CacheKind.TORCH_EXTENSIONS and (
            named := re.fullmatch(r"py(3)(\d+)\w*_(cu|rocm)(\d+)(\d)", PurePosixPath(recorded).name)
        ):
            self.versions |= {
                "python": f"{named[1]}.{named[2]}",
                "cuda" if named[3] == "cu" else "rocm": f"{named[4]}.{named[5]}",
            }

    def look_at_json(self, path: PurePosixPath, content: bytes) -> None:
        """Triton's `NAME.json` and vLLM's `cache_key_factors.json`; other files are ignored."""
        document = json_object(content)
        if document is None:
            return
        if (target := triton_target(document)) is not None:
            self.targets.add(target)
            if isinstance(version := document.get("triton_version"), str):
                self.versions["triton"] = version[:_TEXT_LIMIT]
        elif path.name == "cache_key_factors.json":
            factors = document.get("env")
            if isinstance(factors, dict) and isinstance(cuda := factors.get("VLLM_MAIN_CUDA_VERSION"), str):
                device = factors.get("VLLM_TARGET_DEVICE")
                if device == "cuda":
                    self.versions["cuda"] = cuda[:_TEXT_LIMIT]


def json_object(content: bytes) -> dict[str, JSON] | None:
    """Parse a JSON object; return None for anything else, since a cache may hold any file."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def triton_target(document: Mapping[str, JSON]) -> Target | None:
    """Return the target in the JSON that Triton writes for a kernel, or None."""
    target = document.get("target")
    if not isinstance(target, dict) or not isinstance(document.get("hash"), str):
        return None
    backend, arch, warp = target.get("backend"), target.get("arch"), target.get("warp_size")
    if (
        not isinstance(backend, str)
        or not isinstance(arch, (str, int))
        or not isinstance(warp, int)
        or isinstance(arch, bool)
        or not 0 < len(backend) <= _TEXT_LIMIT
        or len(str(arch)) > _TEXT_LIMIT
        or not 0 <= warp <= _WARP_LIMIT
    ):
        return None
    return Target(backend=backend, arch=str(arch), warp_size=int(warp))
