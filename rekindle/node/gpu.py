# SPDX-License-Identifier: Apache-2.0
"""Probe the GPUs of a node: NVIDIA's through NVML, AMD's through the compute driver's files in sysfs.

It creates no CUDA context and uses no GPU. Facts that a GPU does not support or may not reveal are empty or
false. If a driver cannot be queried or reports impossible facts, `Gpus.problem` says so: probes raise
nothing.
"""

import contextlib
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta, Struct

from rekindle.documents import Count

_SYS, _DEV, _PROC = Path("/sys"), Path("/dev"), Path("/proc")
_GPUS_LIMIT = 1024
_MEMORY_LIMIT_BYTES = 1 << 50
_FILE_LIMIT_BYTES = 1 << 16
_PCI_NVIDIA, _PCI_DISPLAY = "0x10de", "0x03"

# The names of `nvidia-smi topo -m`, by nvmlGpuTopologyLevel_t; 0 is two GPUs on one board.
_LEVELS = {0: "pix", 10: "pix", 20: "pxb", 30: "phb", 40: "node", 50: "sys"}

# drivers/gpu/drm/amd/amdkfd/kfd_topology.h and kfd_crat.h
_KFD_MEMORY_ECC = 1 << 20
_KFD_HEAPS_OF_THE_GPU = (1, 2)  # its memory, whether visible to the processor or not
_KFD_NO_NAME = "ip discovery"  # the driver's name for a chip that it knows only by its parts


class Gpu(Struct, frozen=True, kw_only=True):
    """A GPU.

    `arch` and `warp_size` are as in Triton's targets: `90` and 32, `gfx942` and 64. `uuid` is as the
    vendor's tools print it. `mig` and `ecc` are the present modes, not those after the next reset.
    """

    vendor: str
    name: str
    arch: str
    warp_size: Annotated[int, Meta(ge=0, le=1024)]
    uuid: str
    memory_bytes: Count
    mig: bool = False
    ecc: bool = False


class Gpus(Struct, frozen=True, kw_only=True, rename={"driver": "gpu_driver", "problem": "gpu_problem"}):
    """The GPUs of a node: NVIDIA's first, in NVML's order, which is that of the PCI bus.

    `cuda` is the newest version that the driver supports. `links` names the connection between each pair of
    NVIDIA's GPUs, by their positions in `gpus`: `0-1 nvlink`, or else `pix`, `pxb`, `phb`, `node` or `sys`,
    as nvidia-smi does; pairs that the driver does not report are left out. `problem` says why GPUs that seem
    to exist could not be queried. GPUs that exist but are not assigned to us are not a problem.
    """

    driver: str = ""
    cuda: str = ""
    mps: bool = False
    gpus: Annotated[tuple[Gpu, ...], Meta(max_length=_GPUS_LIMIT)] = ()
    links: Annotated[tuple[str, ...], Meta(max_length=_GPUS_LIMIT**2)] = ()
    problem: str = ""


class _UnavailableError(Exception):
    """NVML cannot be queried. The text is the problem; it is empty if there is no GPU of NVIDIA's."""


def probe(*, sysfs: Path = _SYS, dev: Path = _DEV, proc: Path = _PROC) -> Gpus:
    """Query the drivers now. Ignores CUDA_VISIBLE_DEVICES and the like."""
    nvidia = probe_nvidia(sysfs=sysfs, dev=dev, proc=proc)
    amd = _amd(sysfs)
    return Gpus(
        driver=nvidia.driver or amd.driver,
        cuda=nvidia.cuda,
        mps=nvidia.mps,
        gpus=nvidia.gpus + amd.gpus,
        links=nvidia.links,
        problem="; ".join(problem for problem in (nvidia.problem, amd.problem) if problem),
    )


def probe_nvidia(*, sysfs: Path = _SYS, dev: Path = _DEV, proc: Path = _PROC) -> Gpus:
    """Query only NVIDIA's driver, as `probe` does."""
    try:
        with _nvml(sysfs, dev, proc) as nvml:
            return _nvidia(nvml)
    except _UnavailableError as error:
        return Gpus(problem=str(error))


def held_by(pids: Collection[int]) -> tuple[str, ...]:
    """Return the UUIDs of NVIDIA's GPUs on which one of these processes computes or draws.

    With MIG, it is the UUID of the whole GPU. PIDs are the host's. GPUs that do not report their processes
    are left out, so an empty result does not prove that no GPU is held.
    """
    found: list[str] = []
    with contextlib.suppress(_UnavailableError), _nvml() as nvml:
        for _, handle in _handles(nvml, []):
            with contextlib.suppress(nvml.NVMLError, ValueError):
                kinds = ("Compute", "Graphics")
                if any(pid in pids for kind in kinds for pid in _processes(nvml, handle, kind)):
                    found.append(_text(nvml.nvmlDeviceGetUUID(handle)))
    return tuple(found)


def memory_held(pids: Collection[int]) -> dict[int, int]:
    """Return the bytes that each of these processes holds on NVIDIA's GPUs, including those of CUDA itself.

    Processes of which the driver reports nothing are left out: all, in a container with its own PIDs.
    """
    found: dict[int, int] = {}
    with contextlib.suppress(_UnavailableError), _nvml() as nvml:
        for _, handle in _handles(nvml, []):
            with contextlib.suppress(nvml.NVMLError, ValueError):
                for pid, size in _processes(nvml, handle, "Compute").items():
                    if pid in pids:
                        found[pid] = found.get(pid, 0) + size
    return found


def free_bytes() -> dict[str, int]:
    """Return the free memory of each of NVIDIA's GPUs, by UUID. GPUs that do not tell are left out."""
    found: dict[str, int] = {}
    with contextlib.suppress(_UnavailableError), _nvml() as nvml:
        for _, handle in _handles(nvml, []):
            with contextlib.suppress(nvml.NVMLError, ValueError):
                found[_text(nvml.nvmlDeviceGetUUID(handle))] = int(nvml.nvmlDeviceGetMemoryInfo(handle).free)
    return found


def without_persistence() -> list[str]:
    """Return the names and UUIDs of NVIDIA's GPUs that are shut down when no process uses them."""
    found = []
    with contextlib.suppress(_UnavailableError), _nvml() as nvml:
        for _, handle in _handles(nvml, []):
            with contextlib.suppress(nvml.NVMLError, ValueError):
                if nvml.nvmlDeviceGetPersistenceMode(handle) == nvml.NVML_FEATURE_DISABLED:
                    uuid = _text(nvml.nvmlDeviceGetUUID(handle))
                    found.append(f"{_text(nvml.nvmlDeviceGetName(handle))} ({uuid})")
    return found


@contextlib.contextmanager
def _nvml(sysfs: Path = _SYS, dev: Path = _DEV, proc: Path = _PROC) -> Iterator[Any]:
    """Return NVML, initialized, and shut it down at the end. Raises _UnavailableError."""
    import ctypes

    try:
        ctypes.CDLL("libnvidia-ml.so.1")  # takes 0.2 ms without a driver; importing pynvml takes 25 ms
    except OSError as error:
        raise _UnavailableError(str(error) if _has_driver(dev, proc) else "") from None
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        if isinstance(error, pynvml.NVMLError_DriverNotLoaded) and not _is_on_pci_bus(sysfs):
            raise _UnavailableError from None
        raise _UnavailableError(f"NVML does not start: {_error_text(pynvml, error)}") from None
    try:
        yield pynvml
    finally:
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def _nvidia(nvml: Any) -> Gpus:
    problems: list[str] = []
    handles: list[Any] = []
    gpus: list[Gpu] = []
    for index, handle in _handles(nvml, problems):
        try:
            gpus.append(_nvidia_gpu(nvml, handle))
        except (nvml.NVMLError, ValueError) as error:
            problems.append(f"GPU {index}: {_error_text(nvml, error)}")
        else:
            handles.append(handle)
    driver, cuda = "", ""
    with contextlib.suppress(nvml.NVMLError, ValueError):
        driver = _text(nvml.nvmlSystemGetDriverVersion())
    with contextlib.suppress(nvml.NVMLError):
        version = nvml.nvmlSystemGetCudaDriverVersion()
        cuda = f"{version // 1000}.{version % 1000 // 10}" if version >= 1000 else ""
    return Gpus(
        driver=driver,
        cuda=cuda,
        mps=bool(handles)
        and (_has_mps_daemon() or any(_has_mps_clients(nvml, handle) for handle in handles)),
        gpus=tuple(gpus),
        links=tuple(_links(nvml, handles)),
        problem="; ".join(problems),
    )


def _handles(nvml: Any, problems: list[str]) -> Iterator[tuple[int, Any]]:
    """Yield NVML's index and handle of each GPU that we may query; append what fails to `problems`."""
    try:
        count = nvml.nvmlDeviceGetCount()
    except nvml.NVMLError as error:
        problems.append(f"cannot count the GPUs: {_error_text(nvml, error)}")
        return
    if count > _GPUS_LIMIT:
        problems.append(f"NVML reports {count} GPUs")
        return
    for index in range(count):
        try:
            yield index, nvml.nvmlDeviceGetHandleByIndex(index)
        except nvml.NVMLError_NoPermission:
            continue  # it is counted but not assigned to us: nvml.h on nvmlDeviceGetCount_v2
        except nvml.NVMLError as error:
            problems.append(f"GPU {index}: {_error_text(nvml, error)}")


def _nvidia_gpu(nvml: Any, handle: Any) -> Gpu:
    """Query a GPU. Raises NVMLError if it is lost or the like, ValueError for impossible facts."""
    major, minor = _query(nvml, nvml.nvmlDeviceGetCudaComputeCapability, handle, default=(0, 0))
    if (major, minor) != (0, 0) and not (1 <= major <= 99 and 0 <= minor <= 9):
        raise ValueError(f"impossible compute capability {major}.{minor}")
    memory = _query(nvml, nvml.nvmlDeviceGetMemoryInfo, handle, default=None)
    if memory and memory.total > _MEMORY_LIMIT_BYTES:
        raise ValueError(f"impossible memory size of {memory.total} bytes")
    return Gpu(
        vendor="nvidia",
        name=_text(_query(nvml, nvml.nvmlDeviceGetName, handle, default="")),
        arch=f"{major}{minor}" if major else "",
        warp_size=32,
        uuid=_text(_query(nvml, nvml.nvmlDeviceGetUUID, handle, default="")),
        memory_bytes=memory.total if memory else 0,
        mig=_query(nvml, nvml.nvmlDeviceGetMigMode, handle, default=(0, 0))[0] == nvml.NVML_DEVICE_MIG_ENABLE,
        ecc=_query(nvml, nvml.nvmlDeviceGetEccMode, handle, default=(0, 0))[0] == nvml.NVML_FEATURE_ENABLED,
    )


def _links(nvml: Any, handles: Sequence[Any]) -> Iterator[str]:
    for i, one in enumerate(handles):
        for j, other in enumerate(handles[i + 1 :], i + 1):
            if link := _link(nvml, one, other):
                yield f"{i}-{j} {link}"


def _link(nvml: Any, one: Any, other: Any) -> str:
    # Also OK through switches, where each link ends at the switch.
    with contextlib.suppress(nvml.NVMLError):
        status = nvml.nvmlDeviceGetP2PStatus(one, other, nvml.NVML_P2P_CAPS_INDEX_NVLINK)
        if status == nvml.NVML_P2P_STATUS_OK:
            return "nvlink"
    with contextlib.suppress(nvml.NVMLError):
        return _LEVELS.get(nvml.nvmlDeviceGetTopologyCommonAncestor(one, other), "")
    return ""


def _processes(nvml: Any, handle: Any, kind: str) -> dict[int, int]:
    """Return the host PIDs on a GPU, with the bytes that each holds, 0 if unknown. Raises NVMLError."""
    # _v2 first: driver 535.54.03 answers _v3 with entries longer than pynvml's (XuehaiPan/nvitop#79).
    ask = getattr(nvml, f"nvmlDeviceGet{kind}RunningProcesses_v2")
    try:
        found = ask(handle)
    except nvml.NVMLError_FunctionNotFound:
        found = getattr(nvml, f"nvmlDeviceGet{kind}RunningProcesses_v3")(handle)
    return {process.pid: process.usedGpuMemory or 0 for process in found}


def _has_mps_daemon() -> bool:
    """Tell whether an MPS control daemon listens where a CUDA program would look for it."""
    return Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY") or "/tmp/nvidia-mps", "control").exists()  # noqa: S108


def _has_mps_clients(nvml: Any, handle: Any) -> bool:
    with contextlib.suppress(nvml.NVMLError):
        return bool(_processes(nvml, handle, "MPSCompute"))
    return False


def _query(nvml: Any, question: Callable[[Any], Any], handle: Any, *, default: Any) -> Any:
    """Return the answer, or the default if it is unsupported or not permitted. Raises other NVMLErrors."""
    try:
        return question(handle)
    except (nvml.NVMLError_NotSupported, nvml.NVMLError_FunctionNotFound, nvml.NVMLError_NoPermission):
        return default


def _error_text(nvml: Any, error: Exception) -> str:
    """Return NVML's own text, which nvidia-smi prints, too; pynvml's differs for some errors."""
    if isinstance(error, nvml.NVMLError):
        with contextlib.suppress(nvml.NVMLError, ValueError):
            if text := nvml.nvmlErrorString(error.value):
                return _text(text)
    return str(error)


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _has_driver(dev: Path, proc: Path) -> bool:
    """Tell whether NVIDIA's driver is loaded and accessible.

    The device file alone proves nothing: any libcuda creates it, on any machine, if it may.
    """
    return (dev / "nvidiactl").exists() and (proc / "driver/nvidia/version").exists()


def _is_on_pci_bus(sysfs: Path) -> bool:
    """Tell whether the node has a GPU of NVIDIA's, with or without a driver."""
    with contextlib.suppress(OSError):
        for device in (sysfs / "bus/pci/devices").iterdir():
            with contextlib.suppress(OSError):
                vendor, kind = _read(device / "vendor"), _read(device / "class")
                if vendor == _PCI_NVIDIA and kind.startswith(_PCI_DISPLAY):
                    return True
    return False


def _amd(sysfs: Path) -> Gpus:
    nodes = sysfs / "class/kfd/kfd/topology/nodes"
    try:
        numbers = sorted(int(node.name) for node in nodes.iterdir() if node.name.isdecimal())
    except OSError:
        return Gpus()
    gpus: list[Gpu] = []
    problems: list[str] = []
    for number in numbers:
        try:
            properties = _properties(nodes / str(number) / "properties")
            if _integer(properties, "simd_count"):  # processors are nodes, too
                gpus.append(_amd_gpu(sysfs, nodes / str(number), properties))
        except PermissionError:
            continue  # our cgroup does not allow it
        except (OSError, ValueError) as error:
            problems.append(f"KFD node {number}: {error}")
    driver = ""
    with contextlib.suppress(OSError):
        driver = _read(sysfs / "module/amdgpu/version") if gpus else ""  # the OS kernel's own has no version
    return Gpus(driver=driver, gpus=tuple(gpus), problem="; ".join(problems))


def _amd_gpu(sysfs: Path, node: Path, properties: Mapping[str, str]) -> Gpu:
    """Read a GPU from its KFD node. Raises OSError, and ValueError for impossible facts."""
    version = _integer(properties, "gfx_target_version", at_least=1)
    major, minor, step = version // 10000, version // 100 % 100, version % 100
    if not 1 <= major <= 99 or minor > 15 or step > 15:
        raise ValueError(f"gfx_target_version is {version}")
    arch = f"gfx{major}{minor:x}{step:x}"
    unique_id = _integer(properties, "unique_id", default=0)
    memory = 0
    for bank in (node / "mem_banks").iterdir():
        heap = _properties(bank / "properties")
        if _integer(heap, "heap_type") in _KFD_HEAPS_OF_THE_GPU:
            memory += _integer(heap, "size_in_bytes", at_most=_MEMORY_LIMIT_BYTES)
    return Gpu(
        vendor="amd",
        name=_amd_name(sysfs, node, properties) or f"AMD {arch}",
        arch=arch,
        warp_size=_integer(properties, "wave_front_size", at_least=1, at_most=1024),
        uuid=f"GPU-{unique_id:016x}" if unique_id else "",  # as rocminfo prints it
        memory_bytes=memory,
        mig=False,
        ecc=bool(_integer(properties, "capability", default=0) & _KFD_MEMORY_ECC),
    )


def _amd_name(sysfs: Path, node: Path, properties: Mapping[str, str]) -> str:
    minor = _integer(properties, "drm_render_minor", default=0)
    for path in (sysfs / f"class/drm/renderD{minor}/device/product_name", node / "name"):
        with contextlib.suppress(OSError):
            if (name := _read(path)) and name != _KFD_NO_NAME:
                return name
    return ""


def _properties(path: Path) -> dict[str, str]:
    """Read a properties file of KFD: a name and a decimal number per line."""
    pairs = (line.partition(" ") for line in _read(path).splitlines())
    return {name: value.strip() for name, _, value in pairs}


def _integer(
    properties: Mapping[str, str],
    name: str,
    *,
    at_least: int = 0,
    at_most: int = (1 << 64) - 1,
    default: int | None = None,
) -> int:
    """Return a property as a number, or the default if it is missing.

    Raises ValueError if it is missing without a default, out of range, or not a number.
    """
    text = properties.get(name)
    if text is None and default is not None:
        return default
    if text and text.isascii() and text.isdecimal() and len(text) <= 20 and at_least <= int(text) <= at_most:
        return int(text)
    raise ValueError(f"{name} is {text[:40]!r}" if text is not None else f"it has no {name}")


def _read(path: Path) -> str:
    with open(path, "rb") as file:
        return file.read(_FILE_LIMIT_BYTES).decode(errors="replace").strip()
