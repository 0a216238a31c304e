# SPDX-License-Identifier: Apache-2.0
"""What a node is, as far as a restored process or a kernel cache depends on it.

Read from the kernel, from the drivers and from the metadata of what is installed: nothing is imported, no
command is run, and it costs some milliseconds, or up to a hundred more where there are GPUs.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Self

from msgspec import Meta, Struct

from rekindle import documents
from rekindle.documents import Count
from rekindle.fields import JSON
from rekindle.node.gpu import Gpus
from rekindle.node.gpu import probe as probe_gpus
from rekindle.node.packages import versions

_FEATURES_LIMIT = 100_000
_ARCH_GET_XCOMP_SUPP = 0x1021  # asm/prctl.h, since Linux 5.16
_SYS_ARCH_PRCTL = 158

# The x86-64 psABI's levels, by the kernel's names of the features that each adds.
_LEVELS = (
    ("v2", {"cx16", "lahf_lm", "popcnt", "pni", "sse4_1", "sse4_2", "ssse3"}),
    ("v3", {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"}),
    ("v4", {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}),
)


class Fingerprint(Struct, frozen=True, kw_only=True):
    """The facts. `cpu_features` are the kernel's names of them, as in /proc/cpuinfo; `xsave` is the set of
    extended states that the kernel lets processes have, a bit each as in the register XCR0, 0 if it does not
    say; `capabilities` those that we have and a server that we start, a bit each as in capabilities(7);
    `packages` are the versions of what a command runs with. What a record of before does not say is empty."""

    architecture: str
    cpu_model: str
    cpu_features: Annotated[frozenset[str], Meta(max_length=_FEATURES_LIMIT)]
    kernel: str
    page_bytes: Annotated[int, Meta(ge=1, le=1 << 62)]
    cpu_vendor: str = ""
    xsave: Count = 0
    capabilities: Count = 0
    libc: str = ""
    container: str = ""
    packages: Mapping[str, str] = {}
    devices: Gpus = Gpus()

    @classmethod
    def probe(cls, command: Sequence[str] = (), environment: Mapping[str, str] | None = None) -> Self:
        """Read the facts of this node now, and of what a command would run with."""
        facts: dict[str, str] = {}
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if not line and "processor" in facts:
                break  # the others are like the first
            key, _, value = line.partition(":")
            facts.setdefault(key.strip(), value.strip())
        return cls(
            architecture=os.uname().machine,
            cpu_model=facts.get("model name", "unknown"),
            cpu_features=frozenset((facts.get("flags") or facts.get("Features", "")).split()),
            kernel=os.uname().release,
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
        """Return the field `node` of the record. What tells of GPUs stands beside the rest."""
        document = documents.to_json(self)
        gpus = document.pop("devices")
        del gpus["gpu_lack"]
        features = sorted(self.cpu_features)
        return {**document, **gpus, "cpu_features": features, "cpu_level": self.cpu_level}

    @classmethod
    def from_json(cls, value: object, where: str) -> Self:
        """Raises FormatError."""
        devices = documents.read(value, Gpus, where)
        assert isinstance(value, dict)
        return documents.read({**value, "devices": devices}, cls, where)


def _capabilities() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapPrm:"):
            return int(line.split()[1], 16)
    return 0


def _xsave() -> int:
    """arch_prctl(ARCH_GET_XCOMP_SUPP): the user states that the kernel knows and the processor has."""
    if os.uname().machine != "x86_64":
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
