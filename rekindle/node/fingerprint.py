# SPDX-License-Identifier: Apache-2.0
"""Probe the facts about a node that a restored process or a GPU kernel cache depends on.

They come from the OS kernel, the drivers and the metadata of installed packages: no package is imported and
no command is run. It takes some milliseconds, and up to a hundred more where there are GPUs.
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
from rekindle.node import cpus, credentials, limits
from rekindle.node.credentials import InheritedCredentials
from rekindle.node.gpu import Gpus
from rekindle.node.gpu import probe as probe_gpus
from rekindle.node.packages import versions

_FEATURES_LIMIT = 100_000
_Limit = Annotated[int, Meta(ge=-1, le=(1 << 63) - 1)]
_ARCH_GET_XCOMP_SUPP = 0x1021  # asm/prctl.h, since Linux 5.16
_SYS_ARCH_PRCTL = 158

# The x86-64 psABI's levels, with the OS kernel's names of the features that each adds.
_LEVELS = (
    ("v2", {"cx16", "lahf_lm", "popcnt", "pni", "sse4_1", "sse4_2", "ssse3"}),
    ("v3", {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"}),
    ("v4", {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}),
)


class Fingerprint(Struct, frozen=True, kw_only=True):
    """The facts about a node. Facts that an older record does not contain are empty.

    `cpu_features` are named as in /proc/cpuinfo. `xsave` has a bit for each extended state that the OS
    kernel lets processes use, as in the register XCR0; 0 if unknown. `capabilities` has a bit for each
    capability of ours, as in capabilities(7), which are also those of a server that we start. `packages`
    are the versions that a command runs with. `cpus` are those that we may use, such as `0-3,8`; `cpu_quota`
    is how many CPUs' time our control groups allow, 0 if they do not limit it. `memory_nodes` are the NUMA
    nodes whose memory we may use, written likewise. `limits` are our resource
    limits, soft and hard, with -1 for none. `credentials` are those that a server that we start inherits.
    """

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
    cpus: str = ""
    cpu_quota: Annotated[float, Meta(ge=0, le=1e6)] = 0.0
    memory_nodes: str = ""
    limits: Annotated[Mapping[str, tuple[_Limit, _Limit]], Meta(max_length=64)] = {}
    credentials: InheritedCredentials | None = None
    devices: Gpus = Gpus()

    @classmethod
    def probe(cls, command: Sequence[str] = (), environment: Mapping[str, str] | None = None) -> Self:
        """Probe this node now, and find the packages that a command would run with."""
        facts: dict[str, str] = {}
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if not line and "processor" in facts:
                break  # the other processors are like the first
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
            cpus=cpus.of_thread(),
            cpu_quota=cpus.quota(),
            memory_nodes=_memory_nodes(),
            limits=limits.of_process(),
            credentials=credentials.own(),
            devices=probe_gpus(),
        )

    @property
    def cpu_level(self) -> str:
        """The x86-64 psABI's level, such as `x86-64-v3`; "" for other architectures."""
        if self.architecture != "x86_64":
            return ""
        level = "v1"
        for name, features in _LEVELS:
            if not features <= self.cpu_features:
                break
            level = name
        return f"x86-64-{level}"

    def to_json(self) -> dict[str, JSON]:
        """Return the field `node` of the record, with the fields of `devices` beside the others."""
        document = documents.to_json(self)
        gpus = document.pop("devices")
        del gpus["gpu_problem"]
        features = sorted(self.cpu_features)
        return {**document, **gpus, "cpu_features": features, "cpu_level": self.cpu_level}

    @classmethod
    def from_json(cls, value: object, where: str) -> Self:
        """Read the field `node` of a record. Raises FormatError."""
        devices = documents.read(value, Gpus, where)
        assert isinstance(value, dict)
        return documents.read({**value, "devices": devices}, cls, where)


def _capabilities() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapPrm:"):
            return int(line.split()[1], 16)
    return 0


def _memory_nodes() -> str:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("Mems_allowed_list:"):
            return line.split()[-1]
    return ""


def _xsave() -> int:
    """Return arch_prctl(ARCH_GET_XCOMP_SUPP): the states that OS kernel and CPU support; 0 if unknown."""
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
    """Guess the kind of container that this process runs in; "" for none."""
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
