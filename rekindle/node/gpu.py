# SPDX-License-Identifier: Apache-2.0
"""What GPUs a node has: NVIDIA's as NVML knows them, AMD's as the compute driver shows them in sysfs.

No CUDA context is made and no GPU is used. What a GPU does not support or may not tell is empty or false. A
driver that cannot be asked, and one that says what cannot be, is a lack: nothing here is an error.
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

# What nvidia-smi calls them in `topo -m`, by nvmlGpuTopologyLevel_t; 0 is two GPUs on one board.
_LEVELS = {0: "pix", 10: "pix", 20: "pxb", 30: "phb", 40: "node", 50: "sys"}

# drivers/gpu/drm/amd/amdkfd/kfd_topology.h and kfd_crat.h
_KFD_MEMORY_ECC = 1 << 20
_KFD_HEAPS_OF_THE_GPU = (1, 2)  # its memory, whether the processor sees it or not
_KFD_NO_NAME = "ip discovery"  # how the driver calls a chip that it knows by its parts


class Gpu(Struct, frozen=True, kw_only=True):
    """A GPU. `arch` and `warp_size` are as in Triton's targets: `90` and 32, `gfx942` and 64; `uuid` is as
    the vendor's tools print it. `mig` and `ecc` say what is on now, not what will be after a reset."""

    vendor: str
    name: str
    arch: str
    warp_size: Annotated[int, Meta(ge=0, le=1024)]
    uuid: str
    memory_bytes: Count
    mig: bool = False
    ecc: bool = False


class Gpus(Struct, frozen=True, kw_only=True, rename={"driver": "gpu_driver", "lack": "gpu_lack"}):
    """The GPUs of a node, NVIDIA's first and in NVML's order, which is that of the PCI bus.

    `cuda` is the newest version that the driver knows. `links` says how NVIDIA's GPUs reach each other, for
    each pair of positions in `gpus`: `0-1 nvlink`, or else `pix`, `pxb`, `phb`, `node` or `sys`, as
    nvidia-smi calls them; a pair of which the driver does not tell is left out. `lack` is why GPUs that seem
    to be there could not be asked about. GPUs that the node has and does not give to us are no lack.
    """

    driver: str = ""
    cuda: str = ""
    mps: bool = False
    gpus: Annotated[tuple[Gpu, ...], Meta(max_length=_GPUS_LIMIT)] = ()
    links: Annotated[tuple[str, ...], Meta(max_length=_GPUS_LIMIT**2)] = ()
    lack: str = ""


class _SilentError(Exception):
    """NVML cannot be asked. Its text is the lack; it is empty if there is nothing to be asked about."""


def probe(*, sysfs: Path = _SYS, dev: Path = _DEV, proc: Path = _PROC) -> Gpus:
    """Ask the drivers now. CUDA_VISIBLE_DEVICES and the like are not regarded."""
    nvidia = probe_nvidia(sysfs=sysfs, dev=dev, proc=proc)
    amd = _amd(sysfs)
    return Gpus(
        driver=nvidia.driver or amd.driver,
        cuda=nvidia.cuda,
        mps=nvidia.mps,
        gpus=nvidia.gpus + amd.gpus,
        links=nvidia.links,
        lack="; ".join(lack for lack in (nvidia.lack, amd.lack) if lack),
    )


def probe_nvidia(*, sysfs: Path = _SYS, dev: Path = _DEV, proc: Path = _PROC) -> Gpus:
    """Ask the driver of NVIDIA's GPUs alone, as `probe` does."""
    try:
        with _nvml(sysfs, dev, proc) as nvml:
            return _nvidia(nvml)
    except _SilentError as silent:
        return Gpus(lack=str(silent))


def held_by(pids: Collection[int]) -> tuple[str, ...]:
    """The UUIDs of NVIDIA's GPUs on which one of these processes computes or draws; with MIG, the whole's.

    PIDs are the host's. A GPU that does not tell is left out: none found is no proof that none is held.
    """
    found: list[str] = []
    with contextlib.suppress(_SilentError), _nvml() as nvml:
        for _, handle in _handles(nvml, []):
            with contextlib.suppress(nvml.NVMLError, ValueError):
                kinds = ("Compute", "Graphics")
                if any(pid in pids for kind in kinds for pid in _processes(nvml, handle, kind)):
                    found.append(_text(nvml.nvmlDeviceGetUUID(handle)))
    return tuple(found)


def memory_held(pids: Collection[int]) -> int:
    """The bytes that these processes hold on NVIDIA's GPUs, with what CUDA itself needs; 0 if nobody tells,
    as in a container with PIDs of its own."""
    total = 0
    with contextlib.suppress(_SilentError), _nvml() as nvml:
        for _, handle in _handles(nvml, []):
            with contextlib.suppress(nvml.NVMLError, ValueError):
                held = _processes(nvml, handle, "Compute")
                total += sum(size for pid, size in held.items() if pid in pids)
    return total


@contextlib.contextmanager
def _nvml(sysfs: Path = _SYS, dev: Path = _DEV, proc: Path = _PROC) -> Iterator[Any]:
    """NVML, ready to be asked; it is shut down afterwards. Raises _SilentError."""
    import ctypes

    try:
        ctypes.CDLL("libnvidia-ml.so.1")  # 0.2 ms without a driver; to import pynvml takes 25
    except OSError as error:
        raise _SilentError(str(error) if _has_driver(dev, proc) else "") from None
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        if isinstance(error, pynvml.NVMLError_DriverNotLoaded) and not _on_the_bus(sysfs):
            raise _SilentError from None
        raise _SilentError(f"NVML does not start: {_words(pynvml, error)}") from None
    try:
        yield pynvml
    finally:
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def _nvidia(nvml: Any) -> Gpus:
    lacks: list[str] = []
    handles: list[Any] = []
    gpus: list[Gpu] = []
    for index, handle in _handles(nvml, lacks):
        try:
            gpus.append(_nvidia_gpu(nvml, handle))
        except (nvml.NVMLError, ValueError) as error:
            lacks.append(f"GPU {index}: {_words(nvml, error)}")
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
        mps=bool(handles) and (_mps_daemon() or any(_mps_clients(nvml, handle) for handle in handles)),
        gpus=tuple(gpus),
        links=tuple(_links(nvml, handles)),
        lack="; ".join(lacks),
    )


def _handles(nvml: Any, lacks: list[str]) -> Iterator[tuple[int, Any]]:
    """The GPUs that are ours to ask, by NVML's index."""
    try:
        count = nvml.nvmlDeviceGetCount()
    except nvml.NVMLError as error:
        lacks.append(f"the GPUs cannot be counted: {_words(nvml, error)}")
        return
    if count > _GPUS_LIMIT:
        lacks.append(f"NVML says that there are {count} GPUs")
        return
    for index in range(count):
        try:
            yield index, nvml.nvmlDeviceGetHandleByIndex(index)
        except nvml.NVMLError_NoPermission:
            continue  # it is counted, and not given to us: nvml.h on nvmlDeviceGetCount_v2
        except nvml.NVMLError as error:
            lacks.append(f"GPU {index}: {_words(nvml, error)}")


def _nvidia_gpu(nvml: Any, handle: Any) -> Gpu:
    """Raises NVMLError if the GPU is lost or the like, ValueError for what cannot be."""
    major, minor = _ask(nvml, nvml.nvmlDeviceGetCudaComputeCapability, handle, default=(0, 0))
    if (major, minor) != (0, 0) and not (1 <= major <= 99 and 0 <= minor <= 9):
        raise ValueError(f"its compute capability is said to be {major}.{minor}")
    memory = _ask(nvml, nvml.nvmlDeviceGetMemoryInfo, handle, default=None)
    if memory and memory.total > _MEMORY_LIMIT_BYTES:
        raise ValueError(f"it is said to have {memory.total} bytes of memory")
    return Gpu(
        vendor="nvidia",
        name=_text(_ask(nvml, nvml.nvmlDeviceGetName, handle, default="")),
        arch=f"{major}{minor}" if major else "",
        warp_size=32,
        uuid=_text(_ask(nvml, nvml.nvmlDeviceGetUUID, handle, default="")),
        memory_bytes=memory.total if memory else 0,
        mig=_ask(nvml, nvml.nvmlDeviceGetMigMode, handle, default=(0, 0))[0] == nvml.NVML_DEVICE_MIG_ENABLE,
        ecc=_ask(nvml, nvml.nvmlDeviceGetEccMode, handle, default=(0, 0))[0] == nvml.NVML_FEATURE_ENABLED,
    )


def _links(nvml: Any, handles: Sequence[Any]) -> Iterator[str]:
    for i, one in enumerate(handles):
        for j, other in enumerate(handles[i + 1 :], i + 1):
            if link := _link(nvml, one, other):
                yield f"{i}-{j} {link}"


def _link(nvml: Any, one: Any, other: Any) -> str:
    # True through switches too, where the other end of each link is the switch.
    with contextlib.suppress(nvml.NVMLError):
        status = nvml.nvmlDeviceGetP2PStatus(one, other, nvml.NVML_P2P_CAPS_INDEX_NVLINK)
        if status == nvml.NVML_P2P_STATUS_OK:
            return "nvlink"
    with contextlib.suppress(nvml.NVMLError):
        return _LEVELS.get(nvml.nvmlDeviceGetTopologyCommonAncestor(one, other), "")
    return ""


def _processes(nvml: Any, handle: Any, kind: str) -> dict[int, int]:
    """The host PIDs that a GPU runs, with the bytes that each holds, 0 if untold. Raises NVMLError."""
    # _v2 first: to _v3, driver 535.54.03 answers with entries longer than pynvml's (XuehaiPan/nvitop#79).
    ask = getattr(nvml, f"nvmlDeviceGet{kind}RunningProcesses_v2")
    try:
        found = ask(handle)
    except nvml.NVMLError_FunctionNotFound:
        found = getattr(nvml, f"nvmlDeviceGet{kind}RunningProcesses_v3")(handle)
    return {process.pid: process.usedGpuMemory or 0 for process in found}


def _mps_daemon() -> bool:
    """Whether a control daemon waits where a CUDA program would look for it."""
    return Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY") or "/tmp/nvidia-mps", "control").exists()  # noqa: S108


def _mps_clients(nvml: Any, handle: Any) -> bool:
    with contextlib.suppress(nvml.NVMLError):
        return bool(_processes(nvml, handle, "MPSCompute"))
    return False


def _ask(nvml: Any, question: Callable[[Any], Any], handle: Any, *, default: Any) -> Any:
    """The answer, or the default if NVML or the GPU has none for us. Raises other NVMLErrors."""
    try:
        return question(handle)
    except (nvml.NVMLError_NotSupported, nvml.NVMLError_FunctionNotFound, nvml.NVMLError_NoPermission):
        return default


def _words(nvml: Any, error: Exception) -> str:
    """NVML's own text, as nvidia-smi prints it; pynvml has others for some errors."""
    if isinstance(error, nvml.NVMLError):
        with contextlib.suppress(nvml.NVMLError, ValueError):
            if words := nvml.nvmlErrorString(error.value):
                return _text(words)
    return str(error)


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _has_driver(dev: Path, proc: Path) -> bool:
    """Return whether NVIDIA's driver is loaded and given to us. The device alone proves nothing: any libcuda
    makes it, on any machine, if it may."""
    return (dev / "nvidiactl").exists() and (proc / "driver/nvidia/version").exists()


def _on_the_bus(sysfs: Path) -> bool:
    """Whether there is a GPU of NVIDIA's, driver or not."""
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
    lacks: list[str] = []
    for number in numbers:
        try:
            properties = _properties(nodes / str(number) / "properties")
            if _integer(properties, "simd_count"):  # processors are nodes, too
                gpus.append(_amd_gpu(sysfs, nodes / str(number), properties))
        except PermissionError:
            continue  # its cgroup does not give it to us
        except (OSError, ValueError) as error:
            lacks.append(f"KFD node {number}: {error}")
    driver = ""
    with contextlib.suppress(OSError):
        driver = _read(sysfs / "module/amdgpu/version") if gpus else ""  # the kernel's own amdgpu has none
    return Gpus(driver=driver, gpus=tuple(gpus), lack="; ".join(lacks))


def _amd_gpu(sysfs: Path, node: Path, properties: Mapping[str, str]) -> Gpu:
    """Raises OSError and ValueError."""
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
    """KFD's: a name and a decimal number a line."""
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
    """Raises ValueError for a number that is missing, unless it has a default, or is none."""
    text = properties.get(name)
    if text is None and default is not None:
        return default
    if text and text.isascii() and text.isdecimal() and len(text) <= 20 and at_least <= int(text) <= at_most:
        return int(text)
    raise ValueError(f"{name} is {text[:40]!r}" if text is not None else f"it has no {name}")


def _read(path: Path) -> str:
    with open(path, "rb") as file:
        return file.read(_FILE_LIMIT_BYTES).decode(errors="replace").strip()
