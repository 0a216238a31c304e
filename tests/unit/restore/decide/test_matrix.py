# SPDX-License-Identifier: Apache-2.0
"""Snapshots of one kind of node on nodes of another: which rung, why not the others, and what is fetched.

A case makes an image as its node would have, pushes it to a registry, and lets another node decide, and act,
on it. Of that node everything is real, but for what its probes find. The registry counts the bytes.
"""

import base64
import contextlib
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from oci import dump_layers, resolve, transfer
from oci import image as images
from oci.cache import extract, pack
from oci.cache import image as cache_image
from oci.layout import Layout
from oci.options import RegistryOptions
from oci.reference import Reference, parse
from oci.trust import verifier
from oci.trust.verifier import Verified
from rekindle import dump_tree
from rekindle.config import Limits
from rekindle.criu import Criu
from rekindle.engine.caches import CacheKind, CacheRoot
from rekindle.home import Home
from rekindle.node.fingerprint import Fingerprint
from rekindle.node.gpu import Gpu, Gpus
from rekindle.node.mapped import MappedFile, describe
from rekindle.record import Dump, RecordedEngine
from rekindle.report import Report, Rung
from rekindle.secrets import HIDDEN
from restore import dumps
from restore.decide import abilities, match_loaded, plan
from restore.decide import facts as _facts
from restore.decide.abilities import Abilities
from restore.decide.plan import Facts, Plan
from restore.decide.rules import Strictness
from restore.decide.source import read_kernels
from restore.rungs import place_cache
from tests.conftest import wait_for
from tests.fakes import nodes
from tests.samples import cache as cache_samples
from tests.samples.cache import CREATED, write
from tests.samples.elf import elf_file, note
from tests.samples.record import NODE, RECORD
from tests.samples.registry import access_to, named
from tests.servers.registry.simulator import Registry
from tests.servers.registry.wire import Kind

PROCESS, CACHE, COLD = Rung.PROCESS, Rung.CACHE, Rung.COLD
ABLE = Abilities(criu=Criu(path=Path("/criu"), version="4.2.1"))
PAGES_BYTES = 40_000
COMMAND = ["vllm", "serve", "some/model", "--port", "8000"]


# Nodes.

FEATURES = frozenset({"fpu", "avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16"})
ON_CUDA = {"python": "3.11", "vllm": "0.32.0", "torch": "2.9.0+cu129", "triton": "3.5.0", "cuda": "12.9"}
ON_HIP = {"python": "3.11", "vllm": "0.32.0", "torch": "2.9.0+rocm6.4", "triton": "3.5.0", "hip": "6.4"}
ON_CPU = {"python": "3.11", "vllm": "0.32.0", "torch": "2.9.0+cpu"}


def node(devices: Gpus, **changes: Any) -> Fingerprint:
    """A node with these GPUs, and a vLLM that is made for them."""
    vendor = devices.gpus[0].vendor if devices.gpus else ""
    facts = {
        "cpu_model": "Intel(R) Xeon(R) Platinum 8480+",
        "cpu_vendor": "GenuineIntel",
        "cpu_features": FEATURES,
        "xsave": 0x602E7,
        "kernel": "6.8.0-45-generic",
        "packages": {"nvidia": ON_CUDA, "amd": ON_HIP, "": ON_CPU}[vendor],
        "devices": devices,
    }
    return structs.replace(NODE, **{**facts, **changes})


def but(here: Fingerprint, **changes: Any) -> Fingerprint:
    """A node that differs in this, of itself or of its devices."""
    ours = set(Fingerprint.__struct_fields__)
    devices = {name: changes.pop(name) for name in list(changes) if name not in ours}
    return structs.replace(here, devices=structs.replace(here.devices, **devices), **changes)


def gpus_but(here: Fingerprint, **changes: Any) -> Fingerprint:
    """A node each of whose GPUs differs in this."""
    return but(here, gpus=tuple(structs.replace(gpu, **changes) for gpu in here.devices.gpus))


def others(here: Fingerprint) -> Fingerprint:
    """A node of the same kind, with GPUs of its own."""
    return but(here, gpus=tuple(structs.replace(gpu, uuid=f"{gpu.uuid}-other") for gpu in here.devices.gpus))


H100, A100, L4, B200 = node(nodes.H100), node(nodes.A100), node(nodes.L4), node(nodes.B200)
H200 = others(node(nodes.H200))  # whose GPUs are called like those of the H100
A100_MIG, MI300X, CPU = node(nodes.A100_MIG), node(nodes.MI300X), node(Gpus())
ARM: dict[str, Any] = {
    "architecture": "aarch64",
    "cpu_model": "Neoverse-V2",
    "cpu_vendor": "ARM",
    "cpu_features": frozenset({"sve", "bf16"}),
    "xsave": 0,
}


def with_packages(here: Fingerprint, **versions: str) -> Fingerprint:
    return but(here, packages={**here.packages, **{n.replace("_", "-"): v for n, v in versions.items()}})


def first_gpus(here: Fingerprint, count: int) -> Fingerprint:
    return but(here, gpus=here.devices.gpus[:count])


# The files of a node, and what lies in its caches.


@dataclass(frozen=True, slots=True)
class Place:
    """Directories of a case: where its image is made, and the node that it comes to."""

    top: Path

    @property
    def made(self) -> Path:
        return self.top / "made"

    @property
    def library(self) -> Path:
        return self.top / "node/lib/libmodel.so"

    @property
    def second(self) -> Path:
        return self.top / "node/lib/libother.so"

    def cache(self, kind: CacheKind) -> Path:
        return self.top / "node/caches" / kind


def library(build: int, *, version: int = 1) -> bytes:
    """An ELF file with a build id; all of them are equally long."""
    notes = note("<", b"GNU\0", 3, bytes([build] * 20))
    return elf_file(segments=[(4, 0x800, len(notes), 4)], content=notes + bytes([version] * 100))


def is_replaced(place: Place) -> None:
    write(place.library, library(2))
    os.utime(place.library, (1, 1))


def is_built_again(place: Place) -> None:
    """The same build, with another time, as in another layer of another image."""
    write(place.library, library(1))
    os.utime(place.library, (1, 1))


def is_longer(place: Place) -> None:
    write(place.library, library(1) + bytes(8))


def is_missing(place: Place) -> None:
    place.library.unlink()


def are_missing(place: Place) -> None:
    place.library.unlink()
    place.second.unlink()


def is_another_kernel(place: Place) -> None:
    """Where the kernel cache would bring a file, there is one already."""
    write(kernel(place), b"of another start")


def is_unchanged(_: Place) -> None:
    pass


Target = tuple[str, str, int]
CUDA_90, CUDA_80, HIP_942 = ("cuda", "90", 32), ("cuda", "80", 32), ("hip", "gfx942", 64)


def target_of(gpu: Gpu) -> Target:
    return {"nvidia": "cuda", "amd": "hip"}[gpu.vendor], gpu.arch, gpu.warp_size


def key(target: Target) -> str:
    return base64.b32encode(hashlib.sha256(repr(target).encode()).digest()).decode().rstrip("=")


def kernel(place: Place) -> Path:
    """A file of Triton's cache that a process has mapped: what launches the kernels for a H100."""
    return place.cache(CacheKind.TRITON) / key(CUDA_90) / "launcher.so"


def triton(place: Place, targets: Sequence[Target], version: str) -> CacheRoot:
    directory = place.made / "triton"
    for target in targets:
        backend, arch, warp_size = target
        facts: dict[str, object] = {"hash": key(target).lower(), "triton_version": version, "name": "add"}
        facts["target"] = {"backend": backend, "arch": arch, "warp_size": warp_size}
        write(directory / key(target) / "add.json", json.dumps(facts))
        write(directory / key(target) / "add.bin", os.urandom(3000))
        write(directory / key(target) / "launcher.so", library(3))
    recorded = str(place.cache(CacheKind.TRITON))
    return CacheRoot(kind=CacheKind.TRITON, path=directory, recorded=recorded)


def vllm(place: Place, device: str) -> CacheRoot:
    directory = place.made / "vllm"
    found = cache_samples.vllm(directory, VLLM_TARGET_DEVICE=device)
    write(directory / "torch_compile_cache/0123456789/rank_0_0/backbone/more", os.urandom(4000))
    return structs.replace(found, recorded=str(place.cache(CacheKind.VLLM)))


def inductor(place: Place) -> CacheRoot:
    """With C++ that was compiled for the very processor."""
    directory = place.made / "inductor"
    write(directory / "ab/cabcdefg.so", library(4))
    write(directory / "ab/cabcdefg.py", os.urandom(5000))
    write(directory / "fxgraph/cd/fcdefgh/graph", os.urandom(1000))
    return CacheRoot(kind=CacheKind.INDUCTOR, path=directory, recorded=str(place.cache(CacheKind.INDUCTOR)))


# The table.


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """`was` is the node of the snapshot, of whose GPUs the process held `held`; `here` the other one.

    `process`, `cache` and `cold` are the codes of the reasons, with a `!` for a hard one. `fetches` are the
    layers that come: the dump's, and those of the caches by their roots' names. `moved` is how many GPUs have
    to take another's place. `caches` are those of the image, `kernels` the targets of Triton's besides the
    node's own.
    """

    name: str
    was: Fingerprint
    here: Fingerprint
    rung: Rung | None
    process: str = ""
    cache: str = ""
    cold: str = ""
    fetches: str = ""
    moved: int = 0
    held: int | None = None
    caches: str
    kernels: Sequence[Target] = ()
    maps_a_kernel: bool = False
    files: Callable[[Place], None] = is_unchanged
    able: Abilities = ABLE
    command: Sequence[str] = field(default_factory=lambda: list(COMMAND))
    given: Sequence[str] = ()
    asked: Rung = PROCESS
    strictness: Strictness | None = None
    unpacked: bool = False
    local: bool = False


def case(name: str, was: Fingerprint, here: Fingerprint, rung: Rung | None, **more: Any) -> Case:
    more.setdefault("caches", "triton vllm" if was.devices.gpus else "inductor")
    fetches = {PROCESS: "dump", CACHE: more["caches"]}.get(rung or COLD, "")
    return Case(name=name, was=was, here=here, rung=rung, **{"fetches": fetches, **more})


def process(name: str, was: Fingerprint, here: Fingerprint, process: str = "", **more: Any) -> Case:
    """A case in which the process is restored."""
    return case(name, was, here, PROCESS, process=process, **more)


def kernels(
    name: str, was: Fingerprint, here: Fingerprint, process: str, cache: str = "", **more: Any
) -> Case:
    """A case in which the kernel cache is all that can be used, and as a rule all of it."""
    return case(name, was, here, CACHE, process=process, cache=cache, **more)


def cold(name: str, was: Fingerprint, here: Fingerprint, process: str, cache: str, **more: Any) -> Case:
    """A case in which nothing can be used."""
    return case(name, was, here, COLD, process=process, cache=cache, **more)


def policy(*, soft: str = "", hard: str = "") -> Strictness:
    return Strictness(soft=frozenset(soft.split()), hard=frozenset(hard.split()))


def drivers() -> Iterator[Case]:
    """Every branch of the driver on every other."""
    versions = ["550.144.03", "560.35.03", "570.158.01", "580.65.06", "595.40"]
    for was, here in itertools.permutations(versions, 2):
        nodes_of = but(H100, driver=was), but(H100, driver=here)
        yield kernels(f"driver {was} on {here}", *nodes_of, "driver!")
    yield process("driver 580 on another 580", H100, but(H100, driver="580.82.07"), "driver-version")
    yield process("driver 550 on another 550", L4, but(L4, driver="550.90.07"), "driver-version")


CASES = [
    # GPUs.
    process("H100 on the same", H100, H100),
    process("H100 on another H100", H100, others(H100), "gpu-uuid", moved=1),
    process("8 H200 on 8 others", H200, others(H200), "gpu-uuid", moved=8),
    process("1 of 8 H200 on 8 others", H200, others(H200), "gpu-uuid", moved=8, held=1),
    process("1 of 8 H200 on a node that has 1", H200, first_gpus(H200, 1), held=1),
    kernels("8 H200 on 4", H200, first_gpus(H200, 4), "gpu-count!"),
    kernels("1 of 8 H200 on 4", H200, first_gpus(H200, 4), "gpu-count!", held=1),
    kernels("8 H200, linked otherwise", H200, but(H200, links=("0-1 sys",)), "gpu-topology!"),
    process("1 of 8 H200, linked otherwise", H200, but(H200, links=("0-1 sys",)), held=1),
    process("B200 on another B200", B200, others(B200), "gpu-uuid", moved=1),
    process("L4 on another L4", L4, others(L4), "gpu-uuid", moved=1),
    kernels("H100 on H200", H100, H200, "gpu-model! gpu-uuid", moved=1),
    kernels("H200 on H100", H200, H100, "gpu-count! gpu-model! gpu-memory! gpu-uuid", moved=1),
    kernels("H100 on one with less memory", H100, gpus_but(H100, memory_bytes=1 << 36), "gpu-memory!"),
    process("H100 on one with more memory", H100, gpus_but(H100, memory_bytes=1 << 38)),
    process("H100 on one without ECC", H100, gpus_but(H100, ecc=False), "gpu-ecc"),
    kernels("A100 on A100 with MIG", A100, A100_MIG, "mig!"),
    kernels("A100 with MIG on A100", A100_MIG, A100, "mig!"),
    kernels("H100 on one with MPS", H100, but(H100, mps=True), "mps!"),
    cold("H100 on A100", H100, A100, "gpu-model! gpu-uuid driver!", "cache-target!", moved=1),
    cold("A100 on H100", A100, H100, "gpu-model! gpu-memory! gpu-uuid driver!", "cache-target!", moved=1),
    cold("H100 on L4", H100, L4, "gpu-model! gpu-memory! gpu-uuid driver!", "cache-target!", moved=1),
    cold("H100 on B200", H100, B200, "gpu-model! gpu-uuid driver-version", "cache-target!", moved=1),
    cold(
        "B200 on H100", B200, H100, "gpu-model! gpu-memory! gpu-uuid driver-version", "cache-target!", moved=1
    ),
    cold("L4 on A100", L4, A100, "gpu-model! gpu-uuid driver!", "cache-target!", moved=1),
    cold(
        "H100 on MI300X",
        H100,
        MI300X,
        "gpu-count! gpu-model! gpu-uuid driver!",
        "cache-target! cache-version!",
        moved=1,
    ),
    cold("H100 on a node without GPUs", H100, CPU, "gpu-count! driver!", "cache-target! cache-version!"),
    cold(
        "H100 on one whose driver does not answer",
        H100,
        but(CPU, problem="NVML does not start", packages=ON_CUDA),
        "gpu-probe!",
        "cache-target!",
    ),
    kernels("MI300X on the same", MI300X, MI300X, "gpu-unsupported!"),
    cold("MI300X on H100", MI300X, H100, "gpu-unsupported!", "cache-target! cache-version!", moved=1),
    process("a node without GPUs on the same", CPU, CPU),
    process("a node without GPUs on one with", CPU, but(H100, packages=ON_CPU)),
    # Drivers.
    *drivers(),
    process(
        "driver 570 on 580, by policy",
        but(H100, driver="570.158.01"),
        H100,
        "driver",
        strictness=policy(soft="driver"),
    ),
    kernels(
        "driver 580 on another 580, against the policy",
        H100,
        but(H100, driver="580.82.07"),
        "driver-version!",
        strictness=policy(hard="driver-version"),
    ),
    # Processors.
    kernels("without AMX", H100, but(H100, cpu_features=FEATURES - {"amx_tile", "amx_bf16"}), "cpu-feature!"),
    process("with more than AMX", H100, but(H100, cpu_features=FEATURES | {"apx"}, xsave=0xE02E7)),
    cold(
        "C++ kernels without AMX",
        CPU,
        but(CPU, cpu_features=FEATURES - {"amx_tile", "amx_bf16"}),
        "cpu-feature!",
        "cache-cpu-feature!",
    ),
    kernels("with AMX disabled", CPU, but(CPU, xsave=0x2E7), "xsave!"),
    process("of another vendor", CPU, but(CPU, cpu_vendor="AuthenticAMD"), "cpu-vendor"),
    process("whose kernel does not tell of states", CPU, but(CPU, xsave=0)),
    cold(
        "arm64",
        CPU,
        but(CPU, **ARM),
        "architecture! cpu-feature! cpu-vendor",
        "cache-architecture!",
    ),
    cold(
        "arm64 with pages of 64 KiB",
        H100,
        but(H100, page_bytes=65536, **ARM),
        "architecture! page-size! cpu-feature! cpu-vendor",
        "cache-architecture!",
    ),
    # Kernels and libraries.
    process("a newer kernel", CPU, but(CPU, kernel="6.14.0-27-generic"), "kernel"),
    process("another build of the kernel", CPU, but(CPU, kernel="6.8.0-60-generic"), "kernel"),
    kernels("an older kernel", CPU, but(CPU, kernel="5.15.0-130-generic"), "kernel-older!"),
    process("a newer libc beside the server", CPU, but(CPU, libc="glibc 2.41"), "libc"),
    kernels(
        "a newer libc, which the process has mapped",
        CPU,
        but(CPU, libc="glibc 2.41"),
        "libc rootfs-file!",
        files=is_replaced,
    ),
    kernels(
        "a newer kernel, against the policy",
        CPU,
        but(CPU, kernel="6.14.0"),
        "kernel!",
        strictness=policy(hard="kernel"),
    ),
    process(
        "an older kernel, by policy",
        CPU,
        but(CPU, kernel="5.15.0"),
        "kernel-older",
        strictness=policy(soft="kernel-older cpu-feature"),
    ),
    # Mapped files.
    kernels("a library replaced by another build of its size", CPU, CPU, "rootfs-file!", files=is_replaced),
    kernels("a library of another size", CPU, CPU, "rootfs-file!", files=is_longer),
    kernels("a library that is missing", CPU, CPU, "rootfs-file!", files=is_missing),
    kernels("two that are missing", CPU, CPU, "rootfs-file! rootfs-file!", files=are_missing),
    process("a library of another time", CPU, CPU, files=is_built_again),
    process(
        "a library replaced, by policy",
        CPU,
        CPU,
        "rootfs-file",
        files=is_replaced,
        strictness=policy(soft="rootfs-file"),
    ),
    process("a kernel that the cache brings", H100, H100, maps_a_kernel=True, fetches="dump triton"),
    process(
        "a kernel that the cache brings, to a dump that is here",
        H100,
        others(H100),
        "gpu-uuid",
        moved=1,
        maps_a_kernel=True,
        unpacked=True,
        fetches="triton",
    ),
    kernels(
        "another kernel where the cache would bring one",
        H100,
        H100,
        "rootfs-file!",
        maps_a_kernel=True,
        files=is_another_kernel,
    ),
    kernels(
        "a kernel that the cache brings, and a library that it does not",
        H100,
        H100,
        "rootfs-file!",
        maps_a_kernel=True,
        files=is_missing,
    ),
    cold(
        "a kernel that no cache brings",
        H100,
        H100,
        "rootfs-file!",
        "no-cache!",
        maps_a_kernel=True,
        caches="",
    ),
    # What the node can do.
    kernels("no CRIU", CPU, CPU, "criu!", able=Abilities(problems={"criu": "there is none"})),
    kernels(
        "an older CRIU",
        CPU,
        CPU,
        "criu-version!",
        able=Abilities(criu=Criu(path=Path("/criu"), version="3.19")),
    ),
    kernels(
        "a container without privileges",
        H100,
        but(H100, container="kubernetes"),
        "privileges!",
        able=Abilities(problems={"privileges": "running as user 1000, not as root"}),
    ),
    kernels(
        "no CUDA checkpointing",
        H100,
        H100,
        "cuda!",
        able=structs.replace(ABLE, problems={"cuda": "the driver is too old"}),
    ),
    process(
        "no CUDA checkpointing, of which nothing is held",
        CPU,
        CPU,
        able=structs.replace(ABLE, problems={"cuda": "there is no driver"}),
    ),
    # Other versions: the process is known by its files, the cache by its packages.
    kernels(
        "another Triton",
        H100,
        with_packages(H100, triton="3.6.0"),
        "rootfs-file!",
        "cache-version",
        files=is_replaced,
        fetches="vllm",
    ),
    kernels(
        "another vLLM",
        H100,
        with_packages(H100, vllm="0.33.1"),
        "rootfs-file!",
        "cache-version",
        files=is_replaced,
        fetches="triton",
    ),
    kernels(
        "another torch",
        H100,
        with_packages(H100, torch="2.10.0+cu129"),
        "rootfs-file!",
        "cache-version",
        files=is_replaced,
        fetches="triton",
    ),
    kernels(
        "the same torch for another CUDA",
        H100,
        with_packages(H100, torch="2.9.0+cu130", cuda="13.0"),
        "rootfs-file!",
        "cache-version cache-version",
        files=is_replaced,
        fetches="triton",
    ),
    kernels(
        "the same torch, built here",
        H100,
        with_packages(H100, torch="2.9.0"),
        "rootfs-file!",
        files=is_replaced,
    ),
    cold(
        "all of another version",
        H100,
        with_packages(H100, vllm="0.33.1", torch="2.10.0+cu129", triton="3.6.0"),
        "rootfs-file!",
        "cache-version! cache-version!",
        files=is_replaced,
    ),
    kernels(
        "all of another version, by policy",
        H100,
        with_packages(H100, vllm="0.33.1", torch="2.10.0+cu129", triton="3.6.0"),
        "rootfs-file!",
        "cache-version cache-version",
        files=is_replaced,
        strictness=policy(soft="cache-version"),
    ),
    kernels(
        "nothing known of the versions",
        H100,
        but(H100, packages={}),
        "criu!",
        able=Abilities(problems={"criu": ""}),
    ),
    # Caches.
    kernels(
        "two targets of which one fits",
        H100,
        MI300X,
        "gpu-count! gpu-model! gpu-uuid driver!",
        "cache-target",
        moved=1,
        kernels=[HIP_942],
        caches="triton",
    ),
    kernels(
        "Triton's kernels fit and vLLM's graphs do not",
        H100,
        A100,
        "gpu-model! gpu-uuid driver!",
        "cache-target",
        moved=1,
        kernels=[CUDA_80],
        fetches="triton",
    ),
    cold(
        "kernels for sm_90 on sm_89",
        but(H100, driver=L4.devices.driver),
        L4,
        "gpu-model! gpu-memory! gpu-uuid",
        "cache-target!",
        moved=1,
        caches="triton",
    ),
    cold("no cache", H100, but(H100, kernel="5.15.0"), "kernel-older!", "no-cache!", caches=""),
    process("no cache, which is not needed", H100, H100, cache="no-cache!", caches=""),
    # Commands, and what is asked for.
    process("the same command", CPU, CPU, given=COMMAND),
    process("the same command at another port", CPU, CPU, given=[*COMMAND[:-1], "9000", "--host=0.0.0.0"]),
    kernels(
        "a command with another option", CPU, CPU, "command!", given=[*COMMAND, "--max-model-len", "512"]
    ),
    case(
        "a recorded command that had a secret in it",
        CPU,
        but(CPU, kernel="5.15.0"),
        None,
        process="kernel-older! api-key!",
        cache="no-command!",
        cold="no-command!",
        command=[*COMMAND, "--api-key", HIDDEN],
    ),
    case(
        "such a command, whose key is not given today",
        CPU,
        CPU,
        None,
        process="api-key!",
        cache="no-command!",
        cold="no-command!",
        command=[*COMMAND, "--api-key", HIDDEN],
    ),
    kernels(
        "such a command, and one that is given",
        CPU,
        CPU,
        "api-key!",
        command=[*COMMAND, "--api-key", HIDDEN],
        given=COMMAND,
    ),
    kernels("the kernel cache is asked for", H100, H100, "", asked=CACHE),
    cold("a cold start is asked for", H100, H100, "", "", asked=COLD),
    process("the dump is here", H100, H100, unpacked=True, fetches=""),
    process("the image is here", H100, H100, local=True, fetches=""),
    kernels(
        "the image is here, and is of no use but for its cache",
        H100,
        but(H100, mps=True),
        "mps!",
        local=True,
        fetches="",
    ),
    cold(
        "everything is otherwise",
        H100,
        but(CPU, page_bytes=65536, kernel="5.15.0", **ARM),
        "command! architecture! page-size! cpu-feature! cpu-vendor kernel-older! criu! gpu-count! driver! "
        "rootfs-file! rootfs-file!",
        "cache-architecture!",
        files=are_missing,
        able=Abilities(problems={"criu": "there is none"}),
        given=["python", "-m", "http.server"],
    ),
]


def made(case: Case, place: Place, layout: Layout) -> images.Image:
    """The image of a process on the node that was."""
    gpus = case.was.devices.gpus
    targets = [*dict.fromkeys(target_of(gpu) for gpu in gpus), *case.kernels]
    device = {"nvidia": "cuda", "amd": "rocm"}[gpus[0].vendor] if gpus else "cpu"
    build: dict[str, Callable[[], CacheRoot]] = {
        "triton": lambda: triton(place, targets, case.was.packages["triton"]),
        "vllm": lambda: vllm(place, device),
        "inductor": lambda: inductor(place),
    }
    kernels = None
    if case.caches:
        kernels = pack.pack(
            [build[name]() for name in case.caches.split()],
            layout,
            created=CREATED,
            architecture=case.was.architecture,
            versions=case.was.packages,
        )
    write(place.library, library(1))
    write(place.second, library(5))
    mapped = [described(place.library), described(place.second)]
    if case.maps_a_kernel:
        launcher = described(write(place.made / "launcher.so", library(3)))
        mapped.append(structs.replace(launcher, path=str(kernel(place))))
    dump = place.made / "dump"
    write(dump / "criu/core-7.img", os.urandom(700))
    write(dump / "criu/pages-1.img", os.urandom(PAGES_BYTES))
    write(dump / "shm/segment", os.urandom(5_000))
    files = dump_tree.scan(dump)
    held = tuple(gpu.uuid for gpu in gpus[: len(gpus) if case.held is None else case.held])
    record = structs.replace(
        RECORD,
        engine=RecordedEngine(name="vllm", options={}),
        command=list(case.command),
        node=case.was,
        process=structs.replace(RECORD.process, gpus=held),
        mapped_files=mapped,
        dump=Dump(dump_bytes=1 << 30, stored_bytes=sum(file.size for file in files), files=files),
    )
    return images.build(layout, record, dump_layers.pack(dump, files, layout, workers=1), kernels)


def described(path: Path) -> MappedFile:
    found = describe(str(path))
    assert found is not None
    assert found.identity
    return found


# A node that decides and acts.


@dataclass(slots=True)
class Node:
    """One that restores an image, of which it has found the manifests and the record."""

    case: Case
    home: Home
    reference: Reference
    found: Verified[images.Image]
    kernels: "Verified[cache_image.CacheImage] | None" = None

    def decide(self) -> tuple[Facts, Plan]:
        """As `restore` does: the kernel cache's config is read once it matters."""
        case = self.case
        asked_for_it = case.asked is CACHE
        facts, self.kernels = _facts.gather(
            self.found, self.reference, self.home, case.given, with_cache=asked_for_it
        )
        decided = plan.make(facts, case.asked, case.strictness)
        if facts.cache_unread and decided.first is not None and decided.first.rung is CACHE:
            facts = self.read_cache(facts)
            known = plan.make(facts, case.asked, case.strictness)
            steps = [step for step in decided.steps if step.rung is PROCESS]  # that has been given up by then
            decided = structs.replace(known, steps=[*steps, *known.steps[len(steps) :]])
        return facts, decided

    def read_cache(self, facts: Facts) -> Facts:
        self.kernels = read_kernels(self.found)
        return structs.replace(facts, cache=self.kernels.value, cache_unread=False)

    def act(self, facts: Facts, decided: Plan) -> None:
        """Fetches what the first step needs, to where it needs it."""
        first = decided.first
        if first is not None and first.roots:
            assert self.kernels is not None
            chosen = [root for root in self.kernels.value.inventory.roots if root.name in first.roots]
            where, _ = place_cache.places(chosen, {})
            extract.extract(self.kernels, where, limits=Limits())
        if first is not None and first.rung is PROCESS:
            self.unpack()

    def unpack(self) -> None:
        report = Report(verb="restore")
        with self.home.work("restore") as work, dumps.ready(self.home, work, self.found, report) as dump:
            assert (dump / "criu/pages-1.img").stat().st_size == PAGES_BYTES


@contextlib.contextmanager
def node_of(case: Case, name: str, home: Home) -> Iterator[Node]:
    reference = parse(name)
    with resolve.source(reference, home, RegistryOptions()) as source:
        yield Node(case, home, reference, _facts.load(verifier.dangerously_skip(source)))


@pytest.fixture(scope="module")
def registry() -> Iterator[Registry]:
    with Registry() as running:
        yield running


def given_out(registry: Registry, kind: Kind) -> set[str]:
    """The digests and tags of what was sent."""
    wait_for(lambda: all(request.ended for request in registry.requests), 10)
    return {request.reference for request in registry.asked(None, kind) if request.sent_bytes}


def told(decided: Plan) -> dict[Rung, str]:
    """The reasons as the table has them."""
    return {
        step.rung: " ".join(f"{reason.code}{'!' if reason.hard else ''}" for reason in step.reasons)
        for step in decided.steps
    }


def test_the_table_is_large_and_its_rows_differ() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 40
    assert {case.rung for case in CASES} == {*Rung, None} - {Rung.NEUTRAL}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_a_snapshot_on_another_node(
    case: Case, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, layout = Place(tmp_path), Layout.create(tmp_path / "layout")
    image = made(case, place, layout)
    kernels = cache_image.load(layout, image.cache, Limits()) if image.cache else None
    there = f"{registry.host}/{tmp_path.name.lower()}:1"
    everything = transfer.explore(layout, image.index, Limits())
    transfer.into_registry(layout, everything, named(there), access_to())
    layout.publish(layout, image.index, "1")
    name = f"oci:{layout.root}:1" if case.local else there
    case.files(place)
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    monkeypatch.setattr(Fingerprint, "probe", classmethod(lambda *_: case.here))
    monkeypatch.setattr(abilities, "probe", lambda _: case.able)
    home = Home(tmp_path / "home")
    if case.unpacked:
        with node_of(case, name, home) as here:
            here.unpack()
    registry.requests.clear()

    with node_of(case, name, home) as here:
        facts, decided = here.decide()
        first = decided.first
        assert (first.rung if first else None) == case.rung

        # Before it acts, it has asked for nothing but what it had to know.
        manifests, configs = {"1", image.process.digest}, {image.config.digest}
        matters = case.rung in {CACHE, COLD} or (first and first.roots)
        if kernels is not None and matters and case.asked is not COLD:
            manifests, configs = manifests | {kernels.manifest.digest}, configs | {kernels.config.digest}
        if case.local:
            manifests, configs = set(), set()
        assert given_out(registry, Kind.MANIFEST) == manifests
        assert given_out(registry, Kind.BLOB) == configs
        registry.requests.clear()

        # Then it asks for what the plan said, each byte once, and for nothing else.
        here.act(facts, decided)
        wanted = {layer.digest for layer in image.layers if "dump" in case.fetches.split()}
        if kernels is not None:
            chosen = [root for root in kernels.inventory.roots if root.name in case.fetches.split()]
            wanted |= {kernels.layers[root.layer].digest for root in chosen}
        assert given_out(registry, Kind.BLOB) == wanted
        assert not given_out(registry, Kind.MANIFEST)
        assert registry.sent_bytes == (first.fetch_bytes if first else 0)
        if case.rung is PROCESS and "rootfs-file" not in case.process:
            assert match_loaded.mapped(image.record) == {}, (
                "every file that the process has mapped is there now"
            )

        # `match` and `--plan` look at the kernel cache in any case.
        facts = here.read_cache(facts) if facts.cache_unread else facts
        reasons = told(plan.make(facts, case.asked, case.strictness))
    every = {PROCESS: case.process, CACHE: case.cache, COLD: case.cold}
    assert reasons == {rung: every[rung] for rung in reasons}
    assert len([old for old, new in decided.device_map.items() if old != new]) == case.moved
