# SPDX-License-Identifier: Apache-2.0
"""The CUDA state of a server in its cell: moved into host memory before the dump, and seen to be in it."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rekindle import gpu, processes
from rekindle.cell import Cell
from rekindle.errors import DumpError, NotDumpableError, SpaceError
from rekindle.report import Report

if TYPE_CHECKING:
    from rekindle.cuda import Door

_LOCK_SECONDS = 60.0
# What a CUDA context takes on its GPU beside what the program asked for; it is not part of its state.
_CONTEXT_BYTES = 1 << 30
_JOURNAL = "cuda.json"

_UNSUPPORTED = (
    ("/dev/infiniband/", "RDMA, which CUDA checkpointing does not support", "set NCCL_IB_DISABLE=1"),
    (
        "/dev/nvidia-caps-imex-channels/",
        "memory shared over NVLink",
        "set NCCL_NVLS_ENABLE=0",
    ),
    ("/dmabuf", "GPU memory that is exported to others", "turn off CUDA IPC, or run on one GPU"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CudaState:
    """Which processes hold CUDA, by their PIDs in the cell, on which GPUs, and how many bytes in all; 0 if
    nobody tells."""

    pids: Sequence[int] = ()
    gpus: Sequence[str] = ()
    device_bytes: int = 0


@contextlib.contextmanager
def checkpointed(
    cell: Cell, find_door: Callable[[], "Door"] | None, work: Path, report: Report
) -> Iterator[CudaState]:
    """While within, the CUDA state of the cell's processes is in their memory, and no GPU is in use. Left by
    an exception, every process is as it was found.

    `find_door` is None where there is no NVIDIA GPU. Raises CudaError, and NotDumpableError or SpaceError
    before anything is done to a process.
    """
    if find_door is None:
        yield CudaState()
        return
    from rekindle.cuda import Session

    with contextlib.ExitStack() as stack:
        with report.phase("cuda"):
            inside = {pid: processes.inner_pid(pid) for pid in processes.host_pids(cell)}
            door = find_door()
            stack.callback(door.close)
            holders = [pid for pid in inside if door.restore_thread(pid) is not None]
            state = CudaState(
                pids=sorted(inside[pid] for pid in holders),
                gpus=gpu.held_by(holders) or tuple(each.uuid for each in gpu.probe().gpus),
                device_bytes=gpu.memory_held(holders),
            )
            if holders:
                _refuse_unsupported(cell, state)
                _require_memory(state.device_bytes)
                session = stack.enter_context(Session(door, holders, journal=work / _JOURNAL))
                session.checkpoint_all(timeout_seconds=_LOCK_SECONDS)
                _refuse_leftovers(cell)
        yield state if holders else CudaState()


def require_state(state: CudaState, dump_bytes: int) -> None:
    """Raises DumpError for a dump in which what was on the GPUs cannot be."""
    expected = state.device_bytes - _CONTEXT_BYTES * len(state.pids) * max(1, len(state.gpus))
    if dump_bytes < expected:
        raise DumpError(
            "the dump lacks the state of the GPU",
            cause=f"{state.device_bytes:,} bytes were held on it, and the dump has {dump_bytes:,}",
            hint="is the driver 580 or newer? `rekindle doctor --check cuda`",
        )


def _refuse_unsupported(cell: Cell, state: CudaState) -> None:
    found = []
    devices = gpu.probe()
    if devices.mps:
        found.append("MPS is on, which CUDA checkpointing does not support; end its daemon")
    found += [
        f"{each.name} is in MIG mode, which CUDA checkpointing does not support; nvidia-smi -mig 0"
        for each in devices.gpus
        if each.mig and each.uuid in state.gpus
    ]
    for pid in state.pids:
        for fd, target in processes.descriptors(cell, pid):
            for prefix, what, remedy in _UNSUPPORTED:
                if target.startswith(prefix):
                    name = processes.command(cell, pid)
                    found.append(f"process {pid} ({name}), descriptor {fd} ({target}): {what}; {remedy}")
    if found:
        raise NotDumpableError(
            "the server holds GPU state that cannot be checkpointed",
            cause="\n".join(found),
            hint="turn off what is named above and snapshot again",
        )


def _require_memory(device_bytes: int) -> None:
    """All that is on the GPUs goes through host memory."""
    with open("/proc/meminfo") as file:
        available = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:"))
    if available < device_bytes:
        raise SpaceError(
            "there is not enough memory for what is on the GPUs",
            cause=f"{device_bytes:,} bytes are held there, and {available:,} of the node's memory are free",
            hint="give vLLM less KV cache (--gpu-memory-utilization), or --weights reload",
        )


def _refuse_leftovers(cell: Cell) -> None:
    """A checkpointed process has let go of its GPU; what still holds a device would not come back."""
    found = [
        f"process {pid} ({processes.command(cell, pid)}), descriptor {fd}: {target}"
        for pid in processes.pids(cell)
        for fd, target in processes.descriptors(cell, pid)
        if target.startswith("/dev/nvidia")
    ]
    if found:
        raise NotDumpableError(
            "processes still hold an NVIDIA device, with their CUDA state checkpointed",
            cause="\n".join(found),
            hint="set VLLM_WORKER_MULTIPROC_METHOD=spawn: children that are forked keep their parent's",
        )
