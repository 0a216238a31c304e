# SPDX-License-Identifier: Apache-2.0
"""A sysfs as the kernel's amdgpu makes it, of nodes that are not here."""

from collections.abc import Mapping
from pathlib import Path

from rekindle.node.gpu import Gpus

NODES = "class/kfd/kfd/topology/nodes"
_ECC = 1 << 20


def write_kfd(sysfs: Path, node: Gpus, *, cpus: int = 2) -> None:
    """Processors come first in the topology, as they do there."""
    for number in range(cpus):
        write(sysfs, f"{NODES}/{number}/name", "\n")
        write_properties(sysfs, f"{NODES}/{number}", {"cpu_cores_count": 96, "simd_count": 0})
    for number, gpu in enumerate(node.gpus):
        directory = f"{NODES}/{cpus + number}"
        target = gpu.arch.removeprefix("gfx")
        version = int(target[:-2]) * 10000 + int(target[-2], 16) * 100 + int(target[-1], 16)
        properties = {
            "cpu_cores_count": 0,
            "simd_count": 1216,
            "mem_banks_count": 2,
            "wave_front_size": gpu.warp_size,
            "gfx_target_version": version,
            "vendor_id": 4098,
            "drm_render_minor": 128 + number,
            "capability": 0x28880280 | (_ECC if gpu.ecc else 0),
            "unique_id": int(gpu.uuid.removeprefix("GPU-"), 16),
        }
        write(sysfs, f"{directory}/name", "ip discovery\n")
        write_properties(sysfs, directory, properties)
        heaps = (
            {"heap_type": 1, "size_in_bytes": gpu.memory_bytes},
            {"heap_type": 4, "size_in_bytes": 65536},
        )
        for bank, heap in enumerate(heaps):
            write_properties(sysfs, f"{directory}/mem_banks/{bank}", heap)
        write(sysfs, f"class/drm/renderD{128 + number}/device/product_name", f"{gpu.name}\n")
    if node.driver:
        write(sysfs, "module/amdgpu/version", f"{node.driver}\n")


def write_properties(root: Path, directory: str, properties: Mapping[str, int]) -> None:
    lines = (f"{name} {value}\n" for name, value in properties.items())
    write(root, f"{directory}/properties", "".join(lines))


def write(root: Path, path: str, content: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(content)
