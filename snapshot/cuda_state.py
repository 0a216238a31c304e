# SPDX-License-Identifier: Apache-2.0
"""The CUDA state of a server in its cell: moved into host memory before the dump, and seen to be in it."""

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rekindle.cell import Cell, processes
from rekindle.errors import CapabilityError, DumpError, NotDumpableError, SpaceError
from rekindle.journal import CUDA_JOURNAL
from rekindle.node import gpu
from rekindle.report import Report

if TYPE_CHECKING:
    from rekindle.cuda.door import Door

# For a GPU to finish what it was given, and for its memory to go through the slowest bus; the last is for the
# latter if nobody tells how much there is.
_LOCK_SECONDS = 60.0
_BYTES_PER_SECOND = 500e6
_CHECKPOINT_SECONDS = 600.0
# What a CUDA context takes on its GPU beside what the program asked for; it is not part of its state.
_CONTEXT_BYTES = 1 << 30
_CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True, kw_only=True)
class CudaState:
    """Which processes hold CUDA, by their PIDs in the cell, on which GPUs, and how many bytes in all (0 if
    nobody tells); and what they have in host memory before that of the GPUs comes to it."""

    pids: Sequence[int] = ()
    gpus: Sequence[str] = ()
    device_bytes: int = 0
    host_bytes: int = 0


@contextlib.contextmanager
def checkpointed(
    cell: Cell, find_door: Callable[[], "Door"] | None, work: Path, report: Report
) -> Iterator[CudaState]:
    """While within, the CUDA state of the cell's processes is in their memory, and no GPU is in use. Left by
    an exception, every process is as it was found.

    `find_door` is None where there is no NVIDIA GPU. Raises CapabilityError, CudaError, and NotDumpableError
    or SpaceError before anything is done to a process.
    """
    if find_door is None:
        yield CudaState()
        return
    from rekindle.cuda.session import Session

    with contextlib.ExitStack() as stack:
        with report.phase("cuda"):
            door = _open(cell, find_door, stack)
            holders, state = _look(cell, door) if door else ([], CudaState())
            _refuse(_with_devices(cell, except_for=state.pids))
            if door and holders:
                _refuse_unsupported(state.gpus)
                _require_memory(state.device_bytes)
                moved = state.device_bytes / _BYTES_PER_SECOND or _CHECKPOINT_SECONDS
                session = stack.enter_context(Session(door, holders, work / CUDA_JOURNAL))
                session.checkpoint_all(_LOCK_SECONDS + moved)
                _refuse(_with_devices(cell))
        yield state


def require_state(state: CudaState, dump_bytes: int) -> None:
    """Raises DumpError for a dump in which what was on the GPUs cannot be."""
    contexts = _CONTEXT_BYTES * len(state.pids) * max(1, len(state.gpus))
    if dump_bytes < state.host_bytes + state.device_bytes - contexts:
        raise DumpError(
            "the dump lacks the state of the GPU",
            cause=f"{state.device_bytes:,} bytes were held on it, and the dump has {dump_bytes:,}",
            hint="is the driver 580 or newer? `rekindle doctor --check cuda`",
        )


def _open(cell: Cell, find_door: Callable[[], "Door"], stack: contextlib.ExitStack) -> "Door | None":
    """The door; None if there is none, and nobody here uses a GPU."""
    try:
        return stack.enter_context(contextlib.closing(find_door()))
    except CapabilityError:
        if _with_devices(cell):
            raise
        return None


def _look(cell: Cell, door: "Door") -> tuple[list[int], CudaState]:
    """The processes that hold CUDA, by the PIDs that they have here, and what they hold."""
    from rekindle.cuda.session import holders

    inside = {pid: processes.inner_pid(pid) for pid in processes.host_pids(cell)}
    found = holders(door, inside)
    pids = sorted(inside[pid] for pid in found)
    if not found:
        return found, CudaState()
    every = tuple(each.uuid for each in gpu.probe().gpus if each.vendor == "nvidia")
    state = CudaState(
        pids=pids,
        gpus=gpu.held_by(found) or every,
        device_bytes=gpu.memory_held(found),
        host_bytes=sum(processes.anonymous_bytes(cell, pid) for pid in pids),
    )
    return found, state


def _refuse_unsupported(gpus: Collection[str]) -> None:
    devices = gpu.probe()
    found = ["MPS is on, which CUDA checkpointing does not support; end its daemon"] if devices.mps else []
    found += [
        f"{each.name} is in MIG mode, which CUDA checkpointing does not support; nvidia-smi -mig 0"
        for each in devices.gpus
        if each.mig and each.uuid in gpus
    ]
    if found:
        raise NotDumpableError(
            "the server holds GPU state that cannot be checkpointed",
            cause="\n".join(found),
            hint="turn off what is named above and snapshot again",
        )


def _require_memory(device_bytes: int) -> None:
    """All that is on the GPUs goes through host memory."""
    available = available_bytes()
    if available < device_bytes:
        raise SpaceError(
            "there is not enough memory for what is on the GPUs",
            cause=f"{device_bytes:,} bytes are held there, and {available:,} of the node's memory are free",
            hint="give vLLM less KV cache (--gpu-memory-utilization), or --weights reload",
        )


def available_bytes(proc: Path = Path("/proc"), cgroups: Path = _CGROUPS) -> int:
    """How much memory can be had here: of the node, and of every control group (version 2) that we are in."""
    lines = (proc / "meminfo").read_text().splitlines()
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    groups = (proc / "self/cgroup").read_text().splitlines()
    for group in [line.removeprefix("0::/") for line in groups if line.startswith("0::/")]:
        for directory in (cgroups / group, *(cgroups / group).parents):
            with contextlib.suppress(OSError, ValueError):
                limit, used = (int((directory / f"memory.{name}").read_text()) for name in ("max", "current"))
                counts = dict(line.split() for line in (directory / "memory.stat").read_text().splitlines())
                found.append(limit - used + int(counts.get("inactive_file", 0)))  # the kernel takes that back
    return max(0, min(found))


def _with_devices(cell: Cell, except_for: Collection[int] = ()) -> list[str]:
    """What holds an NVIDIA device, in words."""
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


def _refuse(found: Sequence[str]) -> None:
    """A checkpointed process has let go of its GPUs, and one without CUDA should have none. What still holds
    a device would not come back."""
    if found:
        raise NotDumpableError(
            "processes hold an NVIDIA device that is not part of their CUDA state",
            cause="\n".join(found),
            hint="children that are forked keep their parent's: set VLLM_WORKER_MULTIPROC_METHOD=spawn; and "
            "who asks NVML keeps it open until nvmlShutdown",
        )
