# SPDX-License-Identifier: Apache-2.0
"""Nodes with GPUs, as rekindle.gpu.probe() tells them. `FakeNvml` and `write_kfd` make them."""

import itertools

from msgspec import structs

from rekindle.node.gpu import Gpu, Gpus

MIB = 1 << 20


def nvidia(number: int, name: str, arch: str, mib: int, **facts: bool) -> Gpu:
    """The numbered one of its kind: each has a UUID of its own."""
    return Gpu(
        vendor="nvidia",
        name=name,
        arch=arch,
        warp_size=32,
        uuid=f"GPU-{arch:0>8}-5ca1-ab1e-0000-{number:012x}",
        memory_bytes=mib * MIB,
        mig=facts.get("mig", False),
        ecc=facts.get("ecc", True),
    )


def linked(count: int, link: str) -> tuple[str, ...]:
    """Every two of so many GPUs, linked alike."""
    return tuple(f"{i}-{j} {link}" for i, j in itertools.combinations(range(count), 2))


H100 = Gpus(driver="580.65.06", cuda="13.0", gpus=(nvidia(0, "NVIDIA H100 80GB HBM3", "90", 81559),))
H200 = Gpus(
    driver="580.65.06",
    cuda="13.0",
    gpus=tuple(nvidia(number, "NVIDIA H200", "90", 143771) for number in range(8)),
    links=linked(8, "nvlink"),
)
A100 = Gpus(driver="570.158.01", cuda="12.8", gpus=(nvidia(0, "NVIDIA A100-SXM4-80GB", "80", 81920),))
A100_MIG = structs.replace(A100, gpus=(structs.replace(A100.gpus[0], mig=True),))
L4 = Gpus(driver="550.144.03", cuda="12.4", gpus=(nvidia(0, "NVIDIA L4", "89", 23034),))
B200 = Gpus(driver="580.82.07", cuda="13.0", gpus=(nvidia(0, "NVIDIA B200", "100", 183359),))
MI300X = Gpus(
    driver="6.10.5",
    gpus=tuple(
        Gpu(
            vendor="amd",
            name="AMD Instinct MI300X OAM",
            arch="gfx942",
            warp_size=64,
            uuid=f"GPU-21b6d61638a86f{number:02x}",
            memory_bytes=196592 * MIB,
            mig=False,
            ecc=True,
        )
        for number in range(8)
    ),
)
