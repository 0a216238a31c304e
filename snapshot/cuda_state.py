# SPDX-License-Identifier: Apache-2.0
"""Move the CUDA state of a server into host memory before its dump, and check that the dump holds it."""

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import Struct, field, structs

from rekindle.cell import Cell, descendants, hook, processes
from rekindle.errors import CapabilityError, DumpError, NotDumpableError, SpaceError
from rekindle.journal import CUDA_JOURNAL
from rekindle.node import gpu, memory
from rekindle.report import Report

if TYPE_CHECKING:
    from rekindle.cuda.backend import Backend

_LOCK_SECONDS = 60.0  # for a GPU to finish the work it was given
_NVML_SECONDS = 30.0
_BYTES_PER_SECOND = 500e6  # of GPU memory through the slowest bus
_CHECKPOINT_SECONDS = 600.0  # if the amount of GPU memory is unknown
# NVML also counts what is not moved into host memory: a process's contexts, loaded kernels and workspaces
# (0.5 to 1.5 GiB), and rounding. This much, or this share of what it holds, may be missing from the dump.
_LEAST_SLACK_BYTES = 2 << 30
_SLACK = 0.2


class CudaState(Struct, frozen=True, kw_only=True):
    """The CUDA state of a server.

    `held_bytes` has the GPU memory of each process with CUDA state, by its PID in the cell, 0 if it is
    unknown; `gpus` are their GPUs, by UUID. `host_bytes` is their anonymous memory before the GPU memory is
    moved there.
    """

    held_bytes: Mapping[int, int] = field(default_factory=dict)
    gpus: Sequence[str] = ()
    host_bytes: int = 0

    @property
    def pids(self) -> list[int]:
        return sorted(self.held_bytes)

    @property
    def device_bytes(self) -> int:
        return sum(self.held_bytes.values())


@contextlib.contextmanager
def checkpointed(
    cell: Cell,
    find_backend: Callable[[], "Backend"] | None,
    work: Path,
    report: Report,
    *,
    check_memory: bool = True,
) -> Iterator[CudaState]:
    """Hold the CUDA state of the cell's processes in host memory within the context, with no GPU in use.

    An exception that leaves the context rolls every process back. `find_backend` is None on a node without
    NVIDIA GPUs. Raises CapabilityError, CudaError; NotDumpableError or SpaceError before any process is
    touched.
    """
    if find_backend is None:
        yield CudaState()
        return
    from rekindle.cuda.keep import kept_initialized
    from rekindle.cuda.session import Session

    with contextlib.ExitStack() as stack:
        with report.phase("cuda"):
            if _device_holders(cell):
                _shut_down_nvml(cell, report)
            backend = _open_backend(cell, find_backend, stack)
            inside, state = _find_holders(cell, backend) if backend else ({}, CudaState())
            _require_none(_device_holders(cell, except_for=state.pids))
            if backend and inside:
                _require_supported(state.gpus)
                if check_memory:
                    _require_memory(state.device_bytes)
                seconds = state.device_bytes / _BYTES_PER_SECOND or _CHECKPOINT_SECONDS
                stack.enter_context(kept_initialized())
                session = stack.enter_context(Session(backend, list(inside), work / CUDA_JOURNAL))
                maybe_idle = [pid for pid, inner in inside.items() if not state.held_bytes[inner]]
                idle = session.checkpoint_all(_LOCK_SECONDS + seconds, maybe_idle=maybe_idle)
                state = _without(state, [inside[pid] for pid in idle])
                _require_none(_device_holders(cell))
            report.bytes.device = state.device_bytes or None
        yield state


def _shut_down_nvml(cell: Cell, report: Report) -> None:
    """Let the server's Python processes close the devices that NVML keeps open.

    A process that cannot, or has no hook, is refused later if it still holds one.
    """
    try:
        hook.call(cell, hook.HookPhase.SHUT_DOWN_NVML, _NVML_SECONDS)
    except hook.HookError as error:
        report.say(f"process {error.pid} ({processes.command(cell, error.pid)}) may still use NVML: {error}")


def require_state(state: CudaState, dump_bytes: int) -> None:
    """Raise DumpError if the dump is too small to hold the GPU memory.

    That every process was `checkpointed` and holds no device any more proves more; this finds a driver that
    reports a checkpoint without making one.
    """
    moved = sum(held - max(_LEAST_SLACK_BYTES, int(held * _SLACK)) for held in state.held_bytes.values())
    if moved > 0 and dump_bytes < state.host_bytes + moved:
        raise DumpError(
            "the dump lacks the state of the GPU",
            cause=f"the GPU held {state.device_bytes:,} bytes and host memory {state.host_bytes:,}, "
            f"but the dump has only {dump_bytes:,}",
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


def _find_holders(cell: Cell, backend: "Backend") -> tuple[dict[int, int], CudaState]:
    """Return the processes with CUDA state, and that state.

    The processes are by their PIDs on the host, with those in the cell.
    """
    from rekindle.cuda.session import holders

    every = {pid: descendants.inner_pid(pid) for pid in processes.host_pids(cell)}
    inside = {pid: every[pid] for pid in holders(backend, every)}
    if not inside:
        return {}, CudaState()
    held = gpu.memory_held(inside)
    gpus = tuple(each.uuid for each in gpu.probe().gpus if each.vendor == "nvidia")
    state = CudaState(
        held_bytes={inner: held.get(pid, 0) for pid, inner in inside.items()},
        gpus=gpu.held_by(inside) or gpus,
        host_bytes=sum(processes.anonymous_bytes(cell, pid) for pid in inside.values()),
    )
    return inside, state


def _without(state: CudaState, idle: Sequence[int]) -> CudaState:
    """Return the state without processes that turned out to have none."""
    held = {pid: held for pid, held in state.held_bytes.items() if pid not in idle}
    return structs.replace(state, held_bytes=held) if held else CudaState()


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
            hint="reduce vLLM's KV cache (--gpu-memory-utilization), or use --weights reload; on a machine "
            "whose memory grows when it is used (ballooning), use --no-memory-check",
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
            hint="forked children inherit their parent's devices: set VLLM_WORKER_MULTIPROC_METHOD=spawn; "
            "NVML without CUDA keeps /dev/nvidiactl open until nvmlShutdown, which is called in Python "
            "processes with rekindle's hook; one that has only called cuInit keeps its devices until it ends",
        )
