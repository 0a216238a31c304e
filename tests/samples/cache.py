# SPDX-License-Identifier: Apache-2.0
"""Kernel caches made by hand after real ones, layers made byte by byte, and an image around them."""

import gzip
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from oci import media_types
from oci.cache.image import CacheImage, load
from oci.cache.inventory import FIELD, SCHEMA
from oci.descriptor import Descriptor
from oci.layout import Layout
from rekindle.config import Limits
from rekindle.digest import Digest
from rekindle.engine.caches import CacheKind, CacheRoot

CREATED = "2026-01-02T03:04:05Z"
KEY = "7BSCZXWRLYPEOYLUVL7PGHHPX2IBQNDYRAZRVQS7MMZVJCJ6UJFA"
HIP_KEY = "XTN6PGYW72LEXKQTKIIFZTMOXAAYG4Y3K6W3QROFDKVSH4D3PN7Q"
MTIME_NS = 1_700_000_000_123_456_789


def write(path: Path, content: bytes | str = b"content", *, mode: int = 0o644) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    path.chmod(mode)
    os.utime(path, ns=(MTIME_NS, MTIME_NS))
    return path


def triton(directory: Path, *, recorded: str | None = None) -> CacheRoot:
    """What Triton 3.9 leaves of one kernel for two targets (see the vllm test for a real one)."""
    where = recorded or str(directory)
    targets = {
        KEY: {"backend": "cuda", "arch": 90, "warp_size": 32},
        HIP_KEY: {"backend": "hip", "arch": "gfx942", "warp_size": 64},
    }
    for key, target in targets.items():
        binary = "add.cubin" if target["backend"] == "cuda" else "add.hsaco"
        facts = {"hash": key.lower(), "target": target, "num_warps": 4, "num_stages": 2, "debug": False}
        facts |= {"triton_version": "3.9.0", "name": "add"}
        write(directory / key / "add.json", json.dumps(facts))
        write(directory / key / binary, os.urandom(100) if key == "" else key.encode() * 20)
        children = {name: f"{where}/{key}/{name}" for name in ("add.json", binary)}
        write(directory / key / "__grp__add.json", json.dumps({"child_paths": children}))
    return CacheRoot(kind=CacheKind.TRITON, path=directory, recorded=where)


def vllm(directory: Path, *, recorded: str | None = None, **factors: Any) -> CacheRoot:
    """What vLLM 0.32 leaves: two subgraphs, the key's factors, and what it knows of the model."""
    backbone = directory / "torch_compile_cache/0123456789/rank_0_0/backbone"
    environment = {"VLLM_TARGET_DEVICE": "cuda", "VLLM_MAIN_CUDA_VERSION": "12.9", "VLLM_USE_V1": True}
    document = {"env": environment | factors, "code_hash": "c", "config_hash": "d", "compiler_hash": "e"}
    write(backbone / "cache_key_factors.json", json.dumps(document))
    for number in range(2):
        write(backbone / f"artifact_compile_range_1_2048_subgraph_{number}", bytes(3000))
    write(backbone / "computation_graph.py", "class GraphModule: pass\n")
    write(directory / "modelinfos/llama.json", "{}")
    write(directory / "gpu_p2p_access_cache_for_0,1.json", "{}")
    where = recorded or str(directory)
    return CacheRoot(kind=CacheKind.VLLM, path=directory, recorded=where)


def tree(directory: Path) -> dict[str, tuple[int, int, bytes]]:
    """Every file below a directory: its mode, time and content."""
    return {
        str(path.relative_to(directory)): (
            path.stat().st_mode & 0o7777,
            path.stat().st_mtime_ns,
            path.read_bytes(),
        )
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


PREFIX = "io.rekindle.cache/triton"
TOPS = ("io.rekindle.cache", PREFIX)


def header(name: str, content: bytes = b"", *, kind: bytes = tarfile.REGTYPE, **fields: Any) -> bytes:
    """A member: header, content, padding."""
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    out = info.tobuf(fields.get("form", tarfile.PAX_FORMAT), "utf-8", "surrogateescape")
    return out + content + bytes(-len(content) % 512)


def directory(name: str) -> bytes:
    return header(name, kind=tarfile.DIRTYPE, mode=0o755)


def archive(*members: bytes, end: bytes = bytes(1024), tops: Sequence[str] = TOPS) -> bytes:
    return b"".join([*(directory(top) for top in tops), *members, end])


def image(
    layout: Layout,
    raw: bytes,
    *,
    files: int,
    size: int,
    recorded: str = "/nowhere/triton",
    blob: bytes | None = None,
    diff_id: str | None = None,
    layer_size: int | None = None,
    **changes: Any,
) -> CacheImage:
    """An image of one cache of Triton's, whose only layer is any archive, or any blob."""
    compressed = gzip.compress(raw, 1, mtime=0) if blob is None else blob
    put = layout.put(compressed, media_types.TAR_GZIP_LAYER)
    layer = Descriptor(
        media_type=put.media_type, digest=put.digest, size=put.size if layer_size is None else layer_size
    )
    root = {"kind": "triton", "recorded": recorded, "prefix": PREFIX, "layer": 0, "entries": []}
    root |= {"files": files, "bytes": size, **changes}
    config = {
        "created": CREATED,
        "architecture": "amd64",
        "os": "linux",
        "config": {"Labels": {}},
        "rootfs": {"type": "layers", "diff_ids": [diff_id or Digest.of_bytes(raw)]},
        FIELD: {"schema": SCHEMA, "made_by": "a test", "roots": [root]},
    }
    stored = layout.put(json.dumps(config).encode(), media_types.IMAGE_CONFIG)
    manifest = {
        "schemaVersion": 2,
        "mediaType": media_types.MANIFEST,
        "config": stored.to_json(),
        "layers": [layer.to_json()],
    }
    return load(layout, layout.put(json.dumps(manifest).encode(), media_types.MANIFEST), Limits())


def image_of_mcv(layout: Layout, kind: CacheKind, tree: Path, **labels: str) -> Descriptor:
    """What `mcv --create` makes of a directory: Docker's media types, one layer, no entry for its top."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for path in sorted(tree.rglob("*")):
            tar.add(path, f"io.{kind}.cache/{path.relative_to(tree)}", recursive=False)
        manifest = b'{"vllm": []}'
        info = tarfile.TarInfo(f"io.{kind}.manifest/manifest.json")
        info.size = len(manifest)
        tar.addfile(info, io.BytesIO(manifest))
    raw = buffer.getvalue()
    size = sum(path.stat().st_size for path in tree.rglob("*") if path.is_file())
    summary = '{"targets":[{"backend":"cuda","arch":"90","warp_size":32}]}'
    base = f"cache.{kind}.image"
    known = {f"{base}/entry-count": "1", f"{base}/summary": summary, f"{base}/cache-size-bytes": str(size)}
    layer = layout.put(gzip.compress(raw, mtime=0), "application/vnd.docker.image.rootfs.diff.tar.gzip")
    config = {
        "created": CREATED,
        "architecture": "amd64",
        "os": "linux",
        "config": {"Labels": {**known, "org.opencontainers.image.title": "cache", **labels}},
        "rootfs": {"type": "layers", "diff_ids": [Digest.of_bytes(raw)]},
        "history": [{"created": CREATED, "created_by": "mcv"}],
    }
    docker = "application/vnd.docker.distribution.manifest.v2+json"
    stored = layout.put(json.dumps(config).encode(), "application/vnd.docker.container.image.v1+json")
    document = {
        "schemaVersion": 2,
        "mediaType": docker,
        "config": stored.to_json(),
        "layers": [layer.to_json()],
    }
    return layout.put(json.dumps(document).encode(), docker)


class Inflated(io.BytesIO):
    """The archive within a layer of a layout."""

    def __init__(self, layout: Layout, layer: Descriptor) -> None:
        blob = (layout.root / "blobs/sha256" / layer.digest.hex).read_bytes()
        assert hashlib.sha256(blob).hexdigest() == layer.digest.hex
        super().__init__(gzip.decompress(blob))
