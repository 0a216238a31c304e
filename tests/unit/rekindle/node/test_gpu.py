# SPDX-License-Identifier: Apache-2.0
"""What is said of a node's GPUs is what the drivers say, as far as it can be."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from rekindle.node.gpu import Gpu, Gpus, probe
from tests.fakes import nodes
from tests.fakes.kfd import NODES, write, write_kfd
from tests.fakes.nvml import (
    DRIVER_NOT_LOADED,
    FUNCTION_NOT_FOUND,
    GPU_IS_LOST,
    NO_PERMISSION,
    NOT_SUPPORTED,
    UNKNOWN,
    VERSION_MISMATCH,
    FakeNvml,
)

PROBE = """
import ctypes, json, os, sys, time
from pathlib import Path
from msgspec import structs
from rekindle.node.gpu import held_by, probe
before = set(os.listdir("/proc/self/fd"))
where, pids = json.loads(sys.argv[1])
start = time.perf_counter()
gpus = probe(**{name: Path(path) for name, path in where.items()})
seconds = time.perf_counter() - start
held = held_by(pids)
print(json.dumps({
    "gpus": {**structs.asdict(gpus), "gpus": [structs.asdict(gpu) for gpu in gpus.gpus]},
    "held": held,
    "seconds": seconds,
    "modules": sorted(sys.modules),
    "open": sorted(set(os.listdir("/proc/self/fd")) - before),
}))
"""

# Everything that is asked of one GPU, and what is said of it instead if it does not tell.
ASKED: dict[str, dict[str, Any]] = {
    "nvmlDeviceGetName": {"name": ""},
    "nvmlDeviceGetUUID": {"uuid": ""},
    "nvmlDeviceGetCudaComputeCapability": {"arch": ""},
    "nvmlDeviceGetMemoryInfo": {"memory_bytes": 0},
    "nvmlDeviceGetMigMode": {"mig": False},
    "nvmlDeviceGetEccMode": {"ecc": False},
    "nvmlDeviceGetMPSComputeRunningProcesses_v2": {},
    "nvmlDeviceGetP2PStatus": {},
    "nvmlDeviceGetTopologyCommonAncestor": {},
}


@dataclasses.dataclass(frozen=True, slots=True)
class Said:
    gpus: Gpus
    held: tuple[str, ...]
    seconds: float
    modules: frozenset[str]
    opened: tuple[str, ...]


def ask(environment: dict[str, str], *, pids: list[int] | None = None, **where: Path) -> Said:
    """Probes in a process of its own: the loader reads its path at the start, and keeps what it loaded."""
    arguments = json.dumps([{name: str(path) for name, path in where.items()}, pids or []])
    done = subprocess.run(
        [sys.executable, "-c", PROBE, arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    said: dict[str, Any] = json.loads(done.stdout)
    gpus = said["gpus"]
    gpus["gpus"] = tuple(Gpu(**gpu) for gpu in gpus["gpus"])
    gpus["links"] = tuple(gpus["links"])
    return Said(
        Gpus(**gpus), tuple(said["held"]), said["seconds"], frozenset(said["modules"]), tuple(said["open"])
    )


def changed(node: Gpus, **facts: Any) -> Gpus:
    """The node with other facts of its first GPU."""
    return structs.replace(node, gpus=(structs.replace(node.gpus[0], **facts), *node.gpus[1:]))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> FakeNvml:
    return FakeNvml(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def nvml(built: FakeNvml) -> FakeNvml:
    (built.place / "node").unlink(missing_ok=True)
    return built


@pytest.fixture
def without(tmp_path: Path) -> dict[str, str]:
    """The environment of a process that finds no NVML, even where this machine has one.

    The loader does not look further when it finds an empty file, and images that were built where a driver
    was mounted keep such files.
    """
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib/libnvidia-ml.so.1").touch()
    return {"LD_LIBRARY_PATH": str(tmp_path / "lib"), "CUDA_MPS_PIPE_DIRECTORY": str(tmp_path / "mps")}


@pytest.fixture
def amd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The sysfs of a node with GPUs of AMD's alone."""

    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file: No such file or directory")

    monkeypatch.setattr("ctypes.CDLL", missing)
    write_kfd(tmp_path / "amd", nodes.MI300X)
    return tmp_path / "amd"


def probe_below(sysfs: Path) -> Gpus:
    """The GPUs of a node that has this sysfs and no driver of NVIDIA's."""
    return probe(sysfs=sysfs, dev=sysfs / "dev", proc=sysfs / "proc")


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    """A sysfs, a /dev or a /proc with nothing in it."""
    (tmp_path / "empty").mkdir()
    return tmp_path / "empty"


NVIDIA = {
    "H100": nodes.H100,
    "8 x H200": nodes.H200,
    "A100": nodes.A100,
    "A100 with MIG": nodes.A100_MIG,
    "L4": nodes.L4,
    "B200": nodes.B200,
    "without ECC": changed(nodes.L4, ecc=False),
    "every kind of way": structs.replace(
        nodes.H200,
        gpus=nodes.H200.gpus[:4],
        links=("0-1 nvlink", "0-2 pix", "0-3 pxb", "1-2 phb", "1-3 node", "2-3 sys"),
    ),
}


@pytest.mark.parametrize("node", NVIDIA.values(), ids=NVIDIA)
def test_nvidia_gpus_are_as_nvml_tells_them(nvml: FakeNvml, empty: Path, node: Gpus) -> None:
    nvml.describe(node)
    assert ask(nvml.environment, sysfs=empty).gpus == node


@pytest.mark.parametrize("gfx", ["gfx942", "gfx90a", "gfx1100", "gfx1201"])
def test_amd_gpus_are_as_sysfs_tells_them(amd: Path, gfx: str) -> None:
    node = changed(nodes.MI300X, arch=gfx, ecc=False)
    write_kfd(amd, node)
    assert probe_below(amd) == node


def test_both_vendors_gpus_are_found(nvml: FakeNvml, tmp_path: Path) -> None:
    write_kfd(tmp_path, nodes.MI300X)
    nvml.describe(nodes.H200)
    both = structs.replace(nodes.H200, gpus=nodes.H200.gpus + nodes.MI300X.gpus)
    assert ask(nvml.environment, sysfs=tmp_path).gpus == both


def test_without_a_gpu_there_is_no_problem(without: dict[str, str], empty: Path) -> None:
    said = ask(without, pids=[1], sysfs=empty, dev=empty, proc=empty)
    assert (said.gpus, said.held) == (Gpus(), ())
    assert not said.modules & {"pynvml", "torch", "subprocess"}


def test_without_a_gpu_it_takes_no_time(without: dict[str, str], empty: Path) -> None:
    assert min(ask(without, sysfs=empty, dev=empty, proc=empty).seconds for _ in range(3)) < 0.003


def test_with_gpus_it_takes_little_time(nvml: FakeNvml, empty: Path) -> None:
    nvml.describe(nodes.H200)
    assert min(ask(nvml.environment, sysfs=empty).seconds for _ in range(3)) < 0.1


def test_torch_is_never_imported(nvml: FakeNvml, empty: Path) -> None:
    nvml.describe(nodes.H100)
    modules = ask(nvml.environment, pids=[1], sysfs=empty).modules
    assert "pynvml" in modules
    assert not modules & {"torch", "numpy"}


def test_nothing_of_nvml_stays_open(nvml: FakeNvml, empty: Path) -> None:
    nvml.describe(nodes.H200, fails={"nvmlDeviceGetName": GPU_IS_LOST})
    assert ask(nvml.environment, pids=[1], sysfs=empty).opened == ()


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (VERSION_MISMATCH, "Driver/library version mismatch"),
        (NO_PERMISSION, "Insufficient Permissions"),
        (UNKNOWN, "Unknown Error"),
        (FUNCTION_NOT_FOUND, "Function Not Found"),
    ],
)
def test_an_nvml_that_does_not_start_is_a_problem_in_its_words(
    nvml: FakeNvml, empty: Path, code: int, words: str
) -> None:
    nvml.describe(nodes.H100, init=code)
    said = ask(nvml.environment, pids=[1], sysfs=empty)
    assert said.gpus == Gpus(problem=f"NVML does not start: {words}")
    assert said.held == ()


@pytest.mark.parametrize(
    ("vendor", "kind", "problem"),
    [
        ("0x10de", "0x030200", "NVML does not start: Driver Not Loaded"),
        ("0x10de", "0x020000", ""),  # its network cards
        ("0x1002", "0x030000", ""),
        ("", "", ""),
    ],
)
def test_a_driver_that_is_not_loaded_is_a_problem_only_where_there_is_a_gpu(
    nvml: FakeNvml, empty: Path, vendor: str, kind: str, problem: str
) -> None:
    if vendor:
        write(empty, "bus/pci/devices/0000:17:00.0/vendor", f"{vendor}\n")
        write(empty, "bus/pci/devices/0000:17:00.0/class", f"{kind}\n")
        write(empty, "bus/pci/devices/0000:18:00.0/unfinished", "")
    nvml.describe(nodes.H100, init=DRIVER_NOT_LOADED)
    assert ask(nvml.environment, sysfs=empty).gpus == Gpus(problem=problem)


@pytest.mark.parametrize(
    ("device", "driver", "problem"),
    [
        (True, True, True),
        (True, False, False),  # a libcuda made it, on a node without GPUs
        (False, True, False),  # the node has GPUs, and gives us none
    ],
)
def test_a_library_that_does_not_load_is_a_problem_where_there_is_a_driver_for_us(
    without: dict[str, str], empty: Path, device: bool, driver: bool, problem: bool
) -> None:
    if device:
        (empty / "nvidiactl").touch()
    if driver:
        write(empty, "driver/nvidia/version", "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06\n")
    gpus = ask(without, sysfs=empty, dev=empty, proc=empty).gpus
    assert gpus.problem.endswith("libnvidia-ml.so.1: file too short") == problem
    assert gpus == Gpus(problem=gpus.problem)


@pytest.mark.parametrize("code", [NOT_SUPPORTED, FUNCTION_NOT_FOUND, NO_PERMISSION])
@pytest.mark.parametrize("function", ASKED)
def test_what_a_gpu_does_not_tell_is_empty(nvml: FakeNvml, empty: Path, function: str, code: int) -> None:
    node = structs.replace(changed(nodes.A100_MIG, ecc=True), links=())
    nvml.describe(node, fails={function: code})
    assert ask(nvml.environment, sysfs=empty).gpus == changed(node, **ASKED[function])


def test_a_driver_that_tells_no_version_has_gpus_nevertheless(nvml: FakeNvml, empty: Path) -> None:
    silent = {"nvmlSystemGetDriverVersion": UNKNOWN, "nvmlSystemGetCudaDriverVersion": NOT_SUPPORTED}
    nvml.describe(nodes.H100, fails=silent)
    assert ask(nvml.environment, sysfs=empty).gpus == structs.replace(nodes.H100, driver="", cuda="")


@pytest.mark.parametrize("code", [NOT_SUPPORTED, GPU_IS_LOST])
def test_ways_that_are_not_told_are_left_out(nvml: FakeNvml, empty: Path, code: int) -> None:
    node = structs.replace(nodes.H200, gpus=nodes.H200.gpus[:3], links=("0-1 nvlink", "1-2 node"))
    silent = {"nvmlDeviceGetTopologyCommonAncestor": code}
    nvml.describe(node, one_fails={0: silent})
    assert ask(nvml.environment, sysfs=empty).gpus.links == ("0-1 nvlink", "1-2 node")
    nvml.describe(node, fails={"nvmlDeviceGetP2PStatus": code})
    assert ask(nvml.environment, sysfs=empty).gpus.links == ("0-1 sys", "0-2 sys", "1-2 node")


def test_a_gpu_that_is_lost_is_a_problem_and_the_others_are_found(nvml: FakeNvml, empty: Path) -> None:
    nvml.describe(
        nodes.H200,
        one_fails={
            2: {"nvmlDeviceGetHandleByIndex_v2": GPU_IS_LOST},
            5: {"nvmlDeviceGetMemoryInfo": GPU_IS_LOST},
        },
    )
    gpus = ask(nvml.environment, sysfs=empty).gpus
    assert gpus.problem == "GPU 2: GPU is lost; GPU 5: GPU is lost"
    assert gpus.gpus == tuple(gpu for i, gpu in enumerate(nodes.H200.gpus) if i not in (2, 5))
    assert gpus.links == nodes.linked(6, "nvlink")


def test_a_gpu_that_is_not_given_to_us_is_no_problem(nvml: FakeNvml, empty: Path) -> None:
    nvml.describe(nodes.H200, one_fails={0: {"nvmlDeviceGetHandleByIndex_v2": NO_PERMISSION}})
    gpus = ask(nvml.environment, sysfs=empty).gpus
    assert (gpus.problem, gpus.gpus) == ("", nodes.H200.gpus[1:])


def test_gpus_that_cannot_be_counted_are_a_problem(nvml: FakeNvml, empty: Path) -> None:
    nvml.describe(nodes.H200, fails={"nvmlDeviceGetCount_v2": UNKNOWN})
    gpus = ask(nvml.environment, sysfs=empty).gpus
    assert (gpus.problem, gpus.gpus) == ("cannot count the GPUs: Unknown Error", ())


@pytest.mark.parametrize(
    ("lie", "problem"),
    [
        ({"arch": "100000"}, "GPU 0: impossible compute capability 10000.0"),
        ({"arch": "-15"}, "GPU 0: impossible compute capability -2.5"),
        ({"memory_bytes": (1 << 64) - 1}, f"GPU 0: impossible memory size of {(1 << 64) - 1} bytes"),
        ({"name": "NVIDIA \udcff"}, "GPU 0: .*codec can't decode.*"),
    ],
)
def test_what_cannot_be_is_a_problem(nvml: FakeNvml, empty: Path, lie: dict[str, Any], problem: str) -> None:
    nvml.describe(changed(nodes.H200, **lie))
    gpus = ask(nvml.environment, sysfs=empty).gpus
    assert re.fullmatch(problem, gpus.problem)
    assert gpus.gpus == nodes.H200.gpus[1:]


@pytest.mark.parametrize(
    ("pids", "held"),
    [([], []), ([7], []), ([4242], [0, 3]), ([4243, 9], [3]), ([99], [6]), ([4242, 99], [0, 3, 6])],
)
def test_gpus_are_held_by_who_computes_or_draws(
    nvml: FakeNvml, empty: Path, pids: list[int], held: list[int]
) -> None:
    nvml.describe(nodes.H200, compute={0: [4242], 3: [1, 4242, 4243]}, graphics={6: [99]})
    assert list(ask(nvml.environment, pids=pids, sysfs=empty).held) == [nodes.H200.gpus[i].uuid for i in held]


def test_a_driver_without_the_second_version_of_a_question_is_asked_the_third(
    nvml: FakeNvml, empty: Path
) -> None:
    gone = {
        f"nvmlDeviceGet{kind}RunningProcesses_v2": FUNCTION_NOT_FOUND
        for kind in ("Compute", "Graphics", "MPSCompute")
    }
    nvml.describe(nodes.H200, compute={1: [42]}, mps={1: [42]}, fails=gone)
    said = ask(nvml.environment, pids=[42], sysfs=empty)
    assert said.held == (nodes.H200.gpus[1].uuid,)
    assert said.gpus.mps


def test_a_gpu_that_does_not_tell_who_runs_hides_no_other(nvml: FakeNvml, empty: Path) -> None:
    lost = {"nvmlDeviceGetComputeRunningProcesses_v2": GPU_IS_LOST}
    nvml.describe(nodes.H200, compute={0: [42], 1: [42]}, one_fails={0: lost})
    assert ask(nvml.environment, pids=[42], sysfs=empty).held == (nodes.H200.gpus[1].uuid,)


def test_mps_is_seen_by_its_clients(nvml: FakeNvml, empty: Path) -> None:
    nvml.describe(nodes.H200, mps={7: [4242]})
    assert ask(nvml.environment, sysfs=empty).gpus == structs.replace(nodes.H200, mps=True)


def test_mps_is_seen_by_its_daemon(
    nvml: FakeNvml, without: dict[str, str], empty: Path, tmp_path: Path
) -> None:
    write(tmp_path, "mps/control", "")
    pipes = {"CUDA_MPS_PIPE_DIRECTORY": str(tmp_path / "mps")}
    nvml.describe(nodes.H100)
    assert ask({**nvml.environment, **pipes}, sysfs=empty).gpus == structs.replace(nodes.H100, mps=True)
    assert ask({**without, **pipes}, sysfs=empty, dev=empty, proc=empty).gpus == Gpus()


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("gfx_target_version", "", "gfx_target_version is ''"),
        ("gfx_target_version", "0", "gfx_target_version is '0'"),
        ("gfx_target_version", "91702", "gfx_target_version is 91702"),
        ("gfx_target_version", "90499", "gfx_target_version is 90499"),
        ("gfx_target_version", None, "it has no gfx_target_version"),
        ("wave_front_size", "-64", "wave_front_size is '-64'"),
        ("wave_front_size", "0", "wave_front_size is '0'"),
        ("wave_front_size", "٦٤", "wave_front_size is '٦٤'"),
        ("unique_id", "0x21", "unique_id is '0x21'"),
        ("unique_id", "9" * 5000, f"unique_id is '{'9' * 40}'"),
        ("simd_count", "many", "simd_count is 'many'"),
        ("capability", "1_0", "capability is '1_0'"),
    ],
)
def test_what_sysfs_cannot_mean_is_a_problem(amd: Path, name: str, value: str | None, problem: str) -> None:
    path = amd / NODES / "2/properties"
    lines = [line for line in path.read_text().splitlines() if line.partition(" ")[0] != name]
    path.write_text("\n".join([*lines, *([] if value is None else [f"{name} {value}"])]))
    gpus = probe_below(amd)
    assert gpus.problem == f"KFD node 2: {problem}"
    assert gpus.gpus == nodes.MI300X.gpus[1:]


def test_memory_that_cannot_be_is_a_problem(amd: Path) -> None:
    write(amd, f"{NODES}/2/mem_banks/0/properties", f"heap_type 1\nsize_in_bytes {1 << 63}\n")
    assert probe_below(amd).problem == f"KFD node 2: size_in_bytes is '{1 << 63}'"


def test_memory_is_what_the_processor_sees_of_it_and_what_not(amd: Path) -> None:
    write(amd, f"{NODES}/2/mem_banks/2/properties", "heap_type 2\nsize_in_bytes 4096\n")
    first, *_ = probe_below(amd).gpus
    assert first.memory_bytes == nodes.MI300X.gpus[0].memory_bytes + 4096


def test_a_kfd_node_that_is_half_there_is_a_problem(amd: Path) -> None:
    (amd / NODES / "9/properties").unlink()
    gpus = probe_below(amd)
    assert gpus.problem.startswith("KFD node 9: [Errno 2]")
    assert gpus.gpus == nodes.MI300X.gpus[:-1]


@pytest.mark.parametrize(
    ("product", "name", "expected"),
    [
        ("AMD Instinct MI300X OAM", "ip discovery", "AMD Instinct MI300X OAM"),
        ("", "arcturus", "arcturus"),
        (None, "aldebaran", "aldebaran"),
        (None, "ip discovery", "AMD gfx942"),
        (None, None, "AMD gfx942"),
    ],
)
def test_an_amd_gpu_is_called_what_its_maker_calls_it(
    amd: Path, product: str | None, name: str | None, expected: str
) -> None:
    for path, text in (("class/drm/renderD128/device/product_name", product), (f"{NODES}/2/name", name)):
        if text is None:
            (amd / path).unlink()
        else:
            write(amd, path, f"{text}\n")
    assert probe_below(amd) == changed(nodes.MI300X, name=expected)


def test_an_amd_gpu_that_is_not_given_to_us_is_no_problem(amd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel asks the device cgroup, also of root: reading the properties is an EPERM."""

    def read(path: Path) -> str:
        if path.parent.name == "2":
            raise PermissionError(1, "Operation not permitted", str(path))
        return path.read_text().strip()

    monkeypatch.setattr("rekindle.node.gpu._read", read)
    assert probe_below(amd) == structs.replace(nodes.MI300X, gpus=nodes.MI300X.gpus[1:])


def test_gpus_are_in_the_kernels_order(amd: Path) -> None:
    shutil.rmtree(amd)
    write_kfd(amd, nodes.MI300X, cpus=8)  # the nodes 8 to 15
    write(amd, f"{NODES}/generation_id", "1\n")
    assert probe_below(amd).gpus == nodes.MI300X.gpus


def test_the_kernels_own_amdgpu_has_no_version(amd: Path) -> None:
    (amd / "module/amdgpu/version").unlink()
    assert probe_below(amd) == structs.replace(nodes.MI300X, driver="")
