# SPDX-License-Identifier: Apache-2.0
"""The interface of the backends that checkpoint CUDA: states, calls and errors."""

import contextlib
import re
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from rekindle.errors import CudaError

# For a query or an unlock.
ANSWER_SECONDS = 60.0
# For a step that moves the memory of a GPU, at some GB per second.
STEP_SECONDS = 600.0

INVALID_VALUE, OUT_OF_MEMORY, NOT_INITIALIZED = 1, 2, 3
OPERATING_SYSTEM, ILLEGAL_STATE, NOT_READY, NOT_SUPPORTED = 304, 401, 600, 801

# cuInit names a thread of its process so, after two pipes: libcuda 555.
_RESTORE_THREAD = re.compile(r"cuda[0-9a-f]{11}")
_UUID = re.compile(r"GPU-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class State(StrEnum):
    """The state of CUDA in a process, in the words of cuda-checkpoint."""

    RUNNING = "running"
    LOCKED = "locked"
    CHECKPOINTED = "checkpointed"
    FAILED = "failed"


class Action(StrEnum):
    """A call to the driver about a process."""

    STATE = "state"
    RESTORE_THREAD = "restore-thread"
    LOCK = "lock"
    CHECKPOINT = "checkpoint"
    RESTORE = "restore"
    UNLOCK = "unlock"


class Backend(Protocol):
    """A way to call the driver. PIDs are the host's. Several threads may use it at once, one per process.

    Every method raises CudaError and observes its timeout. A call that timed out may still take effect: the
    next call for that process waits for it.
    """

    @property
    def name(self) -> str:
        """`driver` or `utility`."""

    def state(self, pid: int, *, timeout_seconds: float = ANSWER_SECONDS) -> State:
        """Return the state of a process, even of some that hold no CUDA: `restore_thread` tells."""

    def restore_thread(self, pid: int, *, timeout_seconds: float = ANSWER_SECONDS) -> int | None:
        """Return the TID of the thread that checkpoints and restores; None if the process holds no CUDA."""

    def lock(self, pid: int, timeout_seconds: float) -> None:
        """Wait for the process's GPU work to finish and block new work. After a timeout it runs on."""

    def checkpoint(self, pid: int, *, timeout_seconds: float = STEP_SECONDS) -> None:
        """Move the GPU state of a locked process into its memory and release the GPUs."""

    def restore(
        self, pid: int, device_map: Mapping[str, str], *, timeout_seconds: float = STEP_SECONDS
    ) -> None:
        """Move the state back onto GPUs; the process is locked afterwards.

        `device_map` is empty, or maps the UUID (`GPU-…`) of every GPU that was checkpointed to that of the
        GPU to restore it onto.
        """

    def unlock(self, pid: int, *, timeout_seconds: float = ANSWER_SECONDS) -> None:
        """Let a locked process run on."""

    def close(self) -> None:
        """Release the driver. Idempotent."""


_VERBS = {
    Action.STATE: "report the state of",
    Action.RESTORE_THREAD: "report the restore thread of",
    Action.LOCK: "lock",
    Action.CHECKPOINT: "checkpoint",
    Action.RESTORE: "restore",
    Action.UNLOCK: "unlock",
}
_HINTS = {
    INVALID_VALUE: "the process holds no CUDA or has ended",
    OUT_OF_MEMORY: "free memory on the GPU and restart the server: this restore cannot be repeated",
    NOT_INITIALIZED: "the process is initializing CUDA or exiting: try again",
    OPERATING_SYSTEM: "run as root in the host's PID namespace; a failed restore cannot be repeated",
    ILLEGAL_STATE: "another program may be checkpointing it: see `cuda-checkpoint --get-state`",
    NOT_READY: "its GPU work did not finish in time: end its requests first, or wait longer",
    NOT_SUPPORTED: "the driver does not checkpoint managed memory, MIG, MPS or, before 610, CUDA IPC",
}
_HINTS_OF_STEPS = {
    (
        Action.CHECKPOINT,
        OUT_OF_MEMORY,
    ): "the host needs as much free memory as the process holds on GPUs",
    (
        Action.RESTORE,
        INVALID_VALUE,
    ): "a device map must map every GPU that the process used to one of the same model; "
    "without a map, this node needs as many GPUs as the process used",
}


def failure(step: Action, pid: int, number: int, name: str, text: str) -> CudaError:
    """Return the error for a result of the driver; `number` 0 means that `text` came from elsewhere."""
    error = CudaError(
        f"CUDA could not {_VERBS[step]} process {pid}",
        cause=f"{name} ({number}): {text}" if number else text,
        hint=_HINTS_OF_STEPS.get((step, number)) or _HINTS.get(number, ""),
    )
    error.number = number
    return error


def timed_out(step: Action, pid: int, seconds: float, cause: str = "") -> CudaError:
    """Return the error for a call that was not answered in time."""
    return CudaError(
        f"CUDA did not {_VERBS[step]} process {pid} within {seconds:.3g} s",
        cause=cause,
        hint="wait longer; processes that share GPU memory (NCCL, CUDA IPC) can deadlock",
    )


def check_device_map(device_map: Mapping[str, str], pid: int) -> dict[str, str]:
    """Return the map as a dict. Raises CudaError unless its UUIDs look as the driver prints them."""
    for uuid in (*device_map, *device_map.values()):
        if not _UUID.fullmatch(uuid):
            raise failure(Action.RESTORE, pid, 0, "", f"invalid UUID of a whole GPU {uuid!r}")
    return dict(device_map)


def all_devices(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment in which the driver shows every GPU, as it must to move state between them."""
    return {name: value for name, value in environment.items() if name != "CUDA_VISIBLE_DEVICES"}


def holds_none(pid: int, number: int, *, proc: Path = Path("/proc")) -> bool:
    """Tell whether a failed query for the restore thread means that the process holds no CUDA.

    The driver then returns INVALID_VALUE, or NOT_INITIALIZED if the process has loaded it without calling
    cuInit. It also returns NOT_INITIALIZED while CUDA starts or ends, when a dump would miss the GPU's
    state and be worthless. Only cuInit opens /dev/nvidia-uvm, so that tells the two apart.

    cuda-checkpoint does not tell the result (`number` 0): then the process must not have a thread that is
    named as a restore thread, either. A checkpointed process has one, and no device.
    """
    if number not in {0, NOT_INITIALIZED}:
        return number == INVALID_VALUE
    process = proc / str(pid)
    try:
        descriptors = list((process / "fd").iterdir())
        threads = list((process / "task").iterdir()) if not number else []
    except OSError:
        return not process.exists()
    for descriptor in descriptors:
        with contextlib.suppress(OSError):  # it was just closed
            if str(descriptor.readlink()).startswith("/dev/nvidia-uvm"):
                return False
    for thread in threads:
        with contextlib.suppress(OSError):  # it just ended
            if _RESTORE_THREAD.fullmatch((thread / "comm").read_text().strip()):
                return False
    return True
