# SPDX-License-Identifier: Apache-2.0
"""The labels and the manifest that Model Cache Vault (MCV) and KServe's Kernel Manager read in a cache image.

Written after MCV's `docs/spec-compat.md` and its Go code, `pkg/cache`, `pkg/cacheplan` and
`pkg/preflightcheck` (repository redhat-et/GKM, directory mcv; before that redhat-et/MCU).
docs/cache-image.md says what they do with our images.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath

from msgspec import Struct, field

from oci.cache.inventory import StoredRoot, Target, json_object, triton_target
from rekindle import documents
from rekindle.engine.caches import CacheKind, environment_for
from rekindle.fields import JSON

_LABEL_LIMIT_BYTES = 4096  # MCV fails on a longer label
_HASHES_LIMIT = 64
_MANIFEST_ENTRIES_LIMIT = 100_000
# Directories below VLLM_CACHE_ROOT that MCV neither packs, extracts nor counts.
_NOT_COUNTED = {"modelinfos", "dummy_cache"}
_RANK = re.compile(r"rank_\d+_\d+")
_WARP_SIZES = {"cuda": 32, "rocm": 64, "hip": 64, "tpu": 128, "cpu": 1}
_FORMATS = ("aot_compile", "binary", "triton")


class Survey(Struct, kw_only=True):
    """Facts for MCV about the root that it reads, gathered file by file while that is packed."""

    kind: CacheKind
    counted_bytes: int = 0
    _kernels: dict[str, list[dict[str, JSON]]] = field(default_factory=dict)  # by vLLM's hash; "" is Triton's
    _binary: dict[str, dict[tuple[str, str], dict[str, JSON]]] = field(default_factory=dict)
    _aot: dict[str, list[dict[str, JSON]]] = field(default_factory=dict)
    _hashes: set[str] = field(default_factory=set)
    _below_aot: bool = False

    @property
    def top(self) -> str:
        """The directory of the root in its layer."""
        return f"io.{self.kind}.cache"

    @property
    def manifest_path(self) -> str:
        """The path of `manifest.json` in the layer."""
        return f"io.{self.kind}.manifest/manifest.json"

    def look_at(self, path: PurePosixPath, size: int, content: bytes | None) -> None:
        """Take note of a file of the root. `content` is given if it is JSON."""
        parts = path.parts
        if self.kind is not CacheKind.VLLM:
            self.counted_bytes += size
            if content is not None and (kernel := _kernel(content)):
                self._kernels.setdefault("", []).append(kernel)
            return
        if parts[0] in _NOT_COUNTED:
            return
        self.counted_bytes += size
        if parts[0] != "torch_compile_cache" or len(parts) < 3:
            return
        if parts[1] == "torch_aot_compile":
            self._look_at_aot(parts, size)
            return
        hashed, rest = parts[1], parts[2:]
        self._hashes.add(hashed)
        if content is not None and "triton_cache" in rest and (kernel := _kernel(content)):
            self._kernels.setdefault(hashed, []).append(kernel)
        if len(rest) >= 3 and _RANK.fullmatch(rest[0]):
            self._look_at_artifact(hashed, rest, content)

    def _look_at_aot(self, parts: Sequence[str], size: int) -> None:
        if len(parts) < 4:
            return
        self._hashes.add(parts[2])
        self._below_aot = True
        if len(parts) == 5 and _RANK.fullmatch(parts[3]) and parts[4] == "model":
            entry = {"hash": parts[2], "rank": parts[3], "model_file": "model", "file_size": size}
            self._aot.setdefault(parts[2], []).append(entry)

    def _look_at_artifact(self, hashed: str, rest: Sequence[str], content: bytes | None) -> None:
        rank, prefix, name = rest[:3]
        artifacts = self._binary.setdefault(hashed, {}).setdefault(
            (rank, prefix), {"rank": rank, "prefix": prefix, "artifact_count": 0, "artifact_names": []}
        )
        if name.startswith("artifact_compile_range_") and name not in artifacts["artifact_names"]:
            artifacts["artifact_names"].append(name)
            artifacts["artifact_count"] += 1
            artifacts["cache_save_format"] = "unpacked" if len(rest) > 3 else "binary"
        elif name == "cache_key_factors.json" and content and (factors := json_object(content)):
            # The environment is not copied: it is in vLLM's own file already.
            for hash_name in ("code_hash", "config_hash", "compiler_hash"):
                if isinstance(text := factors.get(hash_name), str):
                    artifacts[hash_name] = text
            environment = factors.get("env")
            if isinstance(environment, dict) and isinstance(
                device := environment.get("VLLM_TARGET_DEVICE"), str
            ):
                artifacts["target_device"] = device

    def manifest(self) -> bytes:
        """Return `manifest.json` in MCV's schema."""
        if self.kind is not CacheKind.VLLM:
            kernels = self._kernels.get("", [])[:_MANIFEST_ENTRIES_LIMIT]
            return json.dumps({"triton": kernels}, indent=1).encode()
        return json.dumps({"vllm": self._vllm_entries()}, indent=1).encode()

    def _vllm_entries(self) -> list[dict[str, JSON]]:
        entries: list[dict[str, JSON]] = []
        for hashed in sorted(self._hashes):
            binary = [each for each in self._binary.get(hashed, {}).values() if each["artifact_count"]]
            if hashed in self._aot:
                entries.append(_entry(hashed, "aot_compile", self._aot[hashed]))
            elif binary:
                entries.append(_entry(hashed, "binary", binary))
            elif hashed in self._kernels:
                entries.append(_entry(hashed, "triton", self._kernels[hashed]))
        return entries

    def labels(
        self, roots: Sequence[StoredRoot], targets: Sequence[Target], extra_bytes: int
    ) -> dict[str, str]:
        """Return the labels of an image with these roots.

        `extra_bytes` is the size of the other roots that MCV counts as part of this one.
        """
        entries = self._vllm_entries()
        if self.kind is CacheKind.VLLM:
            count = len(entries)
            devices = {each.get("target_device", "") for e in entries for each in e.get("binary", ())}
            known = targets or [
                Target(backend=device, arch="unknown", warp_size=_WARP_SIZES.get(device, 0))
                for device in sorted(devices - {""})
            ]
        else:
            count, known = len(self._kernels.get("", [])), targets
        base = f"cache.{self.kind}.image"
        labels = {
            f"{base}/entry-count": str(count),
            f"{base}/summary": _compact({"targets": [documents.to_json(target) for target in known]}),
            f"{base}/cache-size-bytes": str(self.counted_bytes + extra_bytes),
        }
        if self.kind is CacheKind.VLLM:
            formats = [name for name in _FORMATS if any(e["cacheFormat"] == name for e in entries)]
            labels[f"{base}/format"] = ",".join(formats) or "unpacked"
            labels |= self._kserve_labels(roots)
        return labels

    def _kserve_labels(self, roots: Sequence[StoredRoot]) -> dict[str, str]:
        """Return hints for KServe's Kernel Manager: where to mount what, and which variables to set."""
        own = next(root for root in roots if root.prefix == self.top)
        below_aot = self._below_aot and self._hashes == set(self._aot)
        labels = {
            "io.kserve.km/framework": "vllm",
            "io.kserve.km/cache-type": "torch-compile",
            "io.kserve.km/cache-root-env": f"VLLM_CACHE_ROOT={own.recorded}",
            "io.kserve.km/cache-mount-subpath": "torch_compile_cache"
            + ("/torch_aot_compile" if below_aot else ""),
        }
        if self._hashes:
            labels["io.kserve.km/cache-hash"] = ",".join(sorted(self._hashes)[:_HASHES_LIMIT])
        mounts = _compact(
            [_mount(root, self.top) for root in roots if root.prefix.startswith(self.top + "/")]
        )
        if mounts != "[]" and len(mounts.encode()) <= _LABEL_LIMIT_BYTES:
            labels["io.kserve.km/cache-mounts"] = mounts
            # Without it, `mcv --extract` leaves out the name of vLLM's own directory.
            labels["io.kserve.km/split-cache-capture"] = "true"
        return labels


def _mount(root: StoredRoot, top: str) -> Mapping[str, JSON]:
    mount: dict[str, JSON] = {"subPath": root.prefix.removeprefix(top + "/"), "absPath": root.recorded}
    variables = environment_for(root.kind, root.recorded)
    # To MCV, the variable's value is absPath itself. FlashInfer's is not, so it is left out.
    for name, value in variables.items():
        if value == root.recorded:
            mount["env"] = name
    return {**mount, "requiresWritable": True}


def _entry(hashed: str, form: str, items: Sequence[Mapping[str, JSON]]) -> dict[str, JSON]:
    return {"vllmHash": hashed, "cacheFormat": form, form: list(items)}


def _kernel(content: bytes) -> dict[str, JSON] | None:
    """Return MCV's description of a Triton kernel, or None.

    It has no dummy_key, which depends on the Triton of the node that checks it; only `mcv --baremetal` does.
    """
    document = json_object(content)
    target = triton_target(document) if document is not None else None
    if document is None or target is None:
        return None
    kernel: dict[str, JSON] = {"hash": document["hash"], **documents.to_json(target)}
    for name, form in (("ptx_version", int), ("num_stages", int), ("num_warps", int), ("debug", bool)):
        if isinstance(value := document.get(name), form) and value:
            kernel[name] = value
    return kernel


def _compact(value: JSON) -> str:
    return json.dumps(value, separators=(",", ":"))
