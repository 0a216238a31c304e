# SPDX-License-Identifier: Apache-2.0
"""Move the CUDA state of a server into host memory before its dump, and check that the dump holds it."""

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import Struct

from rekindle.cell import Cell, descendants, processes
from rekindle.errors import CapabilityError, DumpError, NotDumpableError, SpaceError
from rekindle.journal import CUDA_JOURNAL
from rekindle.node import gpu, memory
from rekindle.report import Report

if TYPE_CHECKING:
    from rekindle.cuda.backend import Backend

_LOCK_SECONDS = 60.0  # for a GPU to finish the work it was given
_BYTES_PER_SECOND = 500e6  # of GPU memory through the slowest bus
_CHECKPOINT_SECONDS = 600.0  # if the amount of GPU memory is unknown
# What a CUDA context takes on its GPU in addition to the program's memory; it is not part of its state.
_CONTEXT_BYTES = 1 << 30


class CudaState(Struct, frozen=True, kw_only=True):
    """The CUDA state of a server.

    `pids` are the processes with CUDA state, by their PIDs in the cell; `gpus` their GPUs, by UUID.
    `device_bytes` is their GPU memory, 0 if it is unknown; `host_bytes` their anonymous memory before the
    GPU memory is moved there.
    """

    pids: Sequence[int] = ()
    gpus: Sequence[str] = ()
    device_bytes: int = 0
    host_bytes: int = 0


@contextlib.contextmanager
def checkpointed(
    cell: Cell, find_backend: Callable[[], "Backend"] | None, work: Path, report: Report
) -> Iterator[CudaState]:
    """Hold the CUDA state of the cell's processes in host memory within the context, with no GPU in use.

    An exception that leaves the context rolls every process back. `find_backend` is None on a node without
    NVIDIA GPUs. Raises CapabilityError, CudaError; NotDumpableError or SpaceError before any process is
    touched.
    """
    if find_backend is None:
        yield CudaState()
        return
    from rekindle.cuda.session import Session

    with contextlib.ExitStack() as stack:
        with report.phase("cuda"):
            backend = _open_backend(cell, find_backend, stack)
            holders, state = _find_holders(cell, backend) if backend else ([], CudaState())
            _require_none(_device_holders(cell, except_for=state.pids))
            if backend and holders:
                _require_supported(state.gpus)
                _require_memory(state.device_bytes)
                seconds = state.device_bytes / _BYTES_PER_SECOND or _CHECKPOINT_SECONDS
                session = stack.enter_context(Session(backend, holders, work / CUDA_JOURNAL))
                session.checkpoint_all(_LOCK_SECONDS + seconds)
                _require_none(_device_holders(cell))
        yield state


def require_state(state: CudaState, dump_bytes: int) -> None:
    """Raise DumpError if the dump is too small to hold the GPU memory."""
    contexts = _CONTEXT_BYTES * len(state.pids) * max(1, len(state.gpus))
    if dump_bytes < state.host_bytes + state.device_bytes - contexts:
        raise DumpError(
            "the dump lacks the state of the GPU",
            cause=f"the GPU held {state.device_bytes:,} bytes, but the dump has only {dump_bytes:,}",
            hint="is the driver 580 or newer? See `rekindle doctor --check cuda`",
        )


def _open_backend(
    cell: Cell, find_backend: Callable[[], "Backend"], stack: contextlib.ExitStack
) -> "Backend | None":
    """Return the backend, or None if none works but no process in the cell uses a GPU."""
    try:
        return stack.enter_context(contextlib.closing(find_backend()))
    except CapabilityError:
        if _device_holders(cell):
            raise
        return None


def _find_holders(cell: Cell, backend: "Backend") -> tuple[list[int], CudaState]:
    """Return the processes with CUDA state, by their PIDs on the host, and that state."""
    from rekindle.cuda.session import holders

    inside = {pid: descendants.inner_pid(pid) for pid in processes.host_pids(cell)}
    found = holders(backend, inside)
    pids = sorted(inside[pid] for pid in found)
    if not found:
        return found, CudaState()
    every = tuple(each.uuid for each in gpu.probe().gpus if each.vendor == "nvidia")
    state = CudaState(
        pids=pids,
        gpus=gpu.held_by(found) or every,
        device_bytes=gpu.memory_held_bytes(found),
        host_bytes=sum(processes.anonymous_bytes(cell, pid) for pid in pids),
    )
    return found, state


def _require_supported(gpus: Collection[str]) -> None:
    """Raise NotDumpableError if MPS, or MIG on one of the GPUs, prevents checkpointing."""
    devices = gpu.probe()
    found = ["MPS is on, which CUDA checkpointing does not support: end its daemon"] if devices.mps else []
    found += [
        f"{each.name} is in MIG mode, which CUDA checkpointing does not support: nvidia-smi -mig 0"
        for each in devices.gpus
        if each.mig and each.uuid in gpus
    ]
    if found:
        raise NotDumpableError(
            "the server holds GPU state that cannot be checkpointed",
            cause="\n".join(found),
            hint="turn these off, then snapshot again",
        )


def _require_memory(device_bytes: int) -> None:
    """Raise SpaceError if the GPU memory does not fit into host memory, where it is moved."""
    import psutil  # takes 15 ms, and most snapshots have no GPU

    available = memory.within_groups(int(psutil.virtual_memory().available))
    if available < device_bytes:
        raise SpaceError(
            "not enough host memory for the state of the GPUs",
            cause=f"{device_bytes:,} bytes are needed, and {available:,} are available",
            hint="reduce vLLM's KV cache (--gpu-memory-utilization), or use --weights reload",
        )


def _device_holders(cell: Cell, except_for: Collection[int] = ()) -> list[str]:
    """Describe each descriptor and mapping of an NVIDIA device in the cell."""
    return [
        f"process {pid} ({processes.command(cell, pid)}), {where}"
        for pid in processes.pids(cell)
        if pid not in except_for
        for where in (
            *(f"descriptor {fd}: {target}" for fd, target in processes.descriptors(cell, pid)),
            *(f"mapping: {path}" for path in processes.mapped_paths(cell, pid)),
        )
        if ": /dev/nvidia" in where
    ]


def _require_none(holders: Sequence[str]) -> None:
    """Raise NotDumpableError if a process still holds an NVIDIA device.

    A checkpointed process has closed its devices, and one without CUDA state should have none. Another
    device would not be restored.
    """
    if holders:
        raise NotDumpableError(
            "processes hold an NVIDIA device that is not part of their CUDA state",
            cause="\n".join(holders),
            hint="forked children inherit their parent's devices: set VLLM_WORKER_MULTIPROC_METHOD=spawn; a "
            "process that used NVML keeps the device open until nvmlShutdown",
        )
