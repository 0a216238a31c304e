# SPDX-License-Identifier: Apache-2.0
"""Restore the CUDA state of a server's processes, and put it away again before they are killed."""

import contextlib
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING

from msgspec import Struct, field

from rekindle.cell import Cell, processes
from rekindle.errors import CapabilityError, RekindleError, RestoreError
from rekindle.home import Home
from rekindle.record import Process, Record
from rekindle.report import Report

if TYPE_CHECKING:
    from rekindle.cuda.search import Search

_SUSPEND_SECONDS = 60.0
_MEMORY_SECONDS = 5.0
# Hosts with this driver hung after a live restored process was killed: NVIDIA/cuda-checkpoint#53.
HANGING_DRIVER = 590


class CudaRestore(Struct, frozen=True, kw_only=True):
    """The means to restore CUDA state.

    `search` finds the backend that talks to the driver, which is starting meanwhile. `device_map` maps
    recorded GPUs to GPUs of this node, by UUID; empty if they are the same.
    """

    search: "Search"
    device_map: Mapping[str, str] = field(default_factory=dict)


class GpuMemory:
    """The free memory of this node's GPUs, asked in a thread while CRIU works."""

    def __init__(self, process: Process) -> None:
        self._free: Mapping[str, int] = {}
        self._thread = threading.Thread(target=self._ask, name="gpu-memory", daemon=True)
        if process.device_bytes:
            self._thread.start()

    def free_bytes(self) -> Mapping[str, int]:
        """Return it by UUID; empty if it is not known in time."""
        if self._thread.ident is not None:
            self._thread.join(_MEMORY_SECONDS)
        return self._free

    def _ask(self) -> None:
        from rekindle.node import gpu

        self._free = gpu.free_bytes()


def restore_cuda(cell: Cell, process: Process, cuda: CudaRestore | None, memory: GpuMemory) -> None:
    """Restore the CUDA state of the processes that had some. Raises RestoreError, CudaError."""
    from rekindle.cuda.keep import kept_initialized
    from rekindle.cuda.session import Session

    if cuda is None:
        raise CapabilityError("the snapshot holds CUDA state, which this node cannot restore")
    _require_memory(process, cuda.device_map, memory.free_bytes())
    outside = processes.host_pids_by_inner(cell)
    if missing := [pid for pid in process.cuda_pids if pid not in outside]:
        raise RestoreError("processes with CUDA state were not restored", cause=f"PIDs {missing}")
    holders = [outside[pid] for pid in process.cuda_pids]
    with kept_initialized(), contextlib.closing(cuda.search.backend()) as backend:
        # No roll-back: if this fails, the processes end with the cell.
        Session(backend, holders).restore_all(cuda.device_map, roll_back=False)


def end(
    cell: Cell, record: Record, driver: str, home: Home, report: Report, error: BaseException | None = None
) -> None:
    """End a cell, after its processes' CUDA state was put away if a kill could hang this machine.

    `driver` is the version of this node's NVIDIA driver, and `error` what has failed before, if anything has.
    """
    try:
        if must_suspend(record, driver):
            _suspend(cell, record.process, home)
    except (RekindleError, OSError) as failed:
        report.say(f"WARNING: the server is killed with its state on the GPU: {failed}")
    finally:
        cell.end_after(error)


def must_suspend(record: Record, driver: str) -> bool:
    """Tell whether killing a restored server with its state on the GPU could hang this machine."""
    major = driver.partition(".")[0]
    return bool(record.process.cuda_pids) and major.isdecimal() and int(major) >= HANGING_DRIVER


def _suspend(cell: Cell, process: Process, home: Home) -> None:
    """Move the state of the processes that are left into host memory, where a kill does no harm."""
    outside = processes.host_pids_by_inner(cell)
    pids = [outside[pid] for pid in process.cuda_pids if pid in outside]
    if not pids:
        return
    from rekindle.cuda.search import Search
    from rekindle.cuda.session import Session

    with Search(home) as search, contextlib.closing(search.backend()) as backend:
        Session(backend, pids).checkpoint_all(_SUSPEND_SECONDS)


def _require_memory(process: Process, device_map: Mapping[str, str], free: Mapping[str, int]) -> None:
    """Raise RestoreError if the GPUs have too little free memory now.

    A restore that runs out of memory cannot be repeated (NVIDIA/cuda-checkpoint#44).
    """
    places = [device_map.get(uuid, uuid) for uuid in process.gpus]
    if not places or any(uuid not in free for uuid in places):
        return
    available = sum(free[uuid] for uuid in places)
    if available < process.device_bytes:
        raise RestoreError(
            "not enough free memory on the GPU",
            cause=f"the server held {process.device_bytes:,} bytes on GPUs, and {available:,} are free on "
            f"{', '.join(places)}",
            hint="end the programs that use it (nvidia-smi), or choose another one with --gpu UUID",
        )
