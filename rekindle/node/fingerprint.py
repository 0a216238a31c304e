# SPDX-License-Identifier: Apache-2.0
"""What a node is, as far as a restored process or a kernel cache depends on it.

Read from the kernel, from the drivers and from the metadata of what is installed: nothing is imported, no
command is run, and it costs some milliseconds, or up to a hundred more where there are GPUs.
"""

import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from rekindle.fields import JSON, Fields
from rekindle.node.gpu import Gpu, Gpus
from rekindle.node.gpu import probe as probe_gpus
from rekindle.node.packages import versions

_GPUS_LIMIT = 1024
_ARCH_GET_XCOMP_SUPP = 0x1021  # asm/prctl.h, since Linux 5.16
_SYS_ARCH_PRCTL = 158

# The x86-64 psABI's levels, by the kernel's names of the features that each adds.
_LEVELS = (
    ("v2", {"cx16", "lahf_lm", "popcnt", "pni", "sse4_1", "sse4_2", "ssse3"}),
    ("v3", {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"}),
    ("v4", {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fingerprint:
    """The facts. `cpu_features` are the kernel's names of them, as in /proc/cpuinfo; `xsave` is the set of
    extended states that the kernel lets processes have, a bit each as in the register XCR0, 0 if it does not
    say; `capabilities` those that we have and a server that we start, a bit each as in capabilities(7);
    `packages` are the versions of what a command runs with."""

    architecture: str
    cpu_model: str
    cpu_features: frozenset[str]
    kernel: str
    page_bytes: int
    cpu_vendor: str = ""
    xsave: int = 0
    capabilities: int = 0
    libc: str = ""
    container: str = ""
    packages: Mapping[str, str] = field(default_factory=dict)
    devices: Gpus = field(default_factory=Gpus)

    @classmethod
    def probe(cls, command: Sequence[str] = (), environment: Mapping[str, str] | None = None) -> Self:
        """Reads the facts of this node now, and of what a command would run with."""
        facts: dict[str, str] = {}
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if not line and "processor" in facts:
                break  # the others are like the first
            key, _, value = line.partition(":")
            facts.setdefault(key.strip(), value.strip())
        return cls(
            architecture=platform.machine(),
            cpu_model=facts.get("model name", "unknown"),
            cpu_features=frozenset((facts.get("flags") or facts.get("Features", "")).split()),
            kernel=platform.release(),
            page_bytes=os.sysconf("SC_PAGE_SIZE"),
            cpu_vendor=facts.get("vendor_id") or facts.get("CPU implementer", ""),
            xsave=_xsave(),
            capabilities=_capabilities(),
            libc=_libc(),
            container=_container(),
            packages=versions(command, os.environ if environment is None else environment) if command else {},
            devices=probe_gpus(),
        )

    @property
    def cpu_level(self) -> str:
        """`x86-64-v3` and the like; empty for other architectures."""
        if self.architecture != "x86_64":
            return ""
        level = "v1"
        for name, features in _LEVELS:
            if not features <= self.cpu_features:
                break
            level = name
        return f"x86-64-{level}"

    def to_json(self) -> dict[str, JSON]:
        """The field `node` of the record."""
        return {
            "architecture": self.architecture,
            "cpu_vendor": self.cpu_vendor,
            "cpu_model": self.cpu_model,
            "cpu_level": self.cpu_level,
            "cpu_features": sorted(self.cpu_features),
            "xsave": self.xsave,
            "capabilities": self.capabilities,
            "kernel": self.kernel,
            "page_bytes": self.page_bytes,
            "libc": self.libc,
            "container": self.container,
            "packages": dict(self.packages),
            "gpus": [_gpu_to_json(gpu) for gpu in self.devices.gpus],
            "gpu_driver": self.devices.driver,
            "cuda": self.devices.cuda,
            "mps": self.devices.mps,
            "links": list(self.devices.links),
        }

    @classmethod
    def from_json(cls, fields: Fields) -> Self:
        """Raises FormatError. What a record of before does not say is empty."""
        gpus = fields.list_of("gpus", _gpu, at_most=_GPUS_LIMIT) if fields.has("gpus") else []
        return cls(
            architecture=fields.text("architecture"),
            cpu_model=fields.text("cpu_model"),
            cpu_features=frozenset(fields.texts("cpu_features")),
            kernel=fields.text("kernel"),
            page_bytes=fields.integer("page_bytes", at_least=1),
            cpu_vendor=fields.text("cpu_vendor", ""),
            xsave=fields.integer("xsave") if fields.has("xsave") else 0,
            capabilities=fields.integer("capabilities") if fields.has("capabilities") else 0,
            libc=fields.text("libc", ""),
            container=fields.text("container", ""),
            packages=fields.text_map("packages", {}),
            devices=Gpus(
                driver=fields.text("gpu_driver", ""),
                cuda=fields.text("cuda", ""),
                mps=fields.truth("mps", default=False),
                gpus=tuple(gpus),
                links=tuple(fields.texts("links", at_most=_GPUS_LIMIT**2)) if fields.has("links") else (),
            ),
        )


def _gpu_to_json(gpu: Gpu) -> dict[str, JSON]:
    return {
        "vendor": gpu.vendor,
        "name": gpu.name,
        "arch": gpu.arch,
        "warp_size": gpu.warp_size,
        "uuid": gpu.uuid,
        "memory_bytes": gpu.memory_bytes,
        "mig": gpu.mig,
        "ecc": gpu.ecc,
    }


def _gpu(value: object, where: str) -> Gpu:
    fields = Fields(value, where)
    return Gpu(
        vendor=fields.text("vendor"),
        name=fields.text("name"),
        arch=fields.text("arch"),
        warp_size=fields.integer("warp_size", at_most=1024),
        uuid=fields.text("uuid"),
        memory_bytes=fields.integer("memory_bytes"),
        mig=fields.truth("mig", default=False),
        ecc=fields.truth("ecc", default=False),
    )


def _capabilities() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapPrm:"):
            return int(line.split()[1], 16)
    return 0


def _xsave() -> int:
    """arch_prctl(ARCH_GET_XCOMP_SUPP): the user states that the kernel knows and the processor has."""
    if platform.machine() != "x86_64":
        return 0
    import ctypes

    mask = ctypes.c_uint64()
    failed = ctypes.CDLL(None).syscall(_SYS_ARCH_PRCTL, _ARCH_GET_XCOMP_SUPP, ctypes.byref(mask))
    return 0 if failed else mask.value


def _libc() -> str:
    try:
        return os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (ValueError, OSError):  # musl has none
        return ""


def _container() -> str:
    """What kind of container this is, as far as it shows; empty for none."""
    if Path("/.dockerenv").exists():
        return "docker"
    if Path("/run/.containerenv").exists():
        return "podman"
    if os.environ.get("KUBERNETES_SERVICE_HOST"):
        return "kubernetes"
    try:
        groups = Path("/proc/1/cgroup").read_text()
    except OSError:
        return ""
    found = re.search(r"docker|containerd|crio|kubepods|lxc|libpod", groups)
    return found[0] if found else ""
