# SPDX-License-Identifier: Apache-2.0
"""What is the same whichever way a process's CUDA state is reached: states, calls, and what errors mean."""

import contextlib
import re
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from rekindle.errors import CudaError

# A question, or an unlock; and what moves the memory of a GPU, at some GB a second.
ANSWER_SECONDS = 60.0
STEP_SECONDS = 600.0

INVALID_VALUE, OUT_OF_MEMORY, NOT_INITIALIZED = 1, 2, 3
OPERATING_SYSTEM, ILLEGAL_STATE, NOT_READY, NOT_SUPPORTED = 304, 401, 600, 801

_UUID = re.compile(r"GPU-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class State(StrEnum):
    """What CUDA in a process is in, as cuda-checkpoint prints it."""

    RUNNING = "running"
    LOCKED = "locked"
    CHECKPOINTED = "checkpointed"
    FAILED = "failed"


class Action(StrEnum):
    """What can be asked of the driver for a process."""

    STATE = "state"
    RESTORE_THREAD = "restore-thread"
    LOCK = "lock"
    CHECKPOINT = "checkpoint"
    RESTORE = "restore"
    UNLOCK = "unlock"


class Door(Protocol):
    """A way to the driver. PIDs are the host's; several threads may use it at once, one for each process.

    Everything raises CudaError, and nothing waits longer than it is told. What the driver was at when time
    was over may still happen: the next call for that process waits for it.
    """

    @property
    def name(self) -> str:
        """`driver` or `utility`."""

    def state(self, pid: int, *, timeout_seconds: float = ANSWER_SECONDS) -> State:
        """Also of some processes that hold no CUDA: `restore_thread` tells."""

    def restore_thread(self, pid: int, *, timeout_seconds: float = ANSWER_SECONDS) -> int | None:
        """The thread that checkpoints and restores; None if the process holds no CUDA."""

    def lock(self, pid: int, timeout_seconds: float) -> None:
        """Lets the GPU finish what it was given, and nothing new begin. If time is over, it is running on."""

    def checkpoint(self, pid: int, *, timeout_seconds: float = STEP_SECONDS) -> None:
        """Moves what a locked process holds on GPUs into its memory, and gives the GPUs back."""

    def restore(
        self, pid: int, device_map: Mapping[str, str], *, timeout_seconds: float = STEP_SECONDS
    ) -> None:
        """The opposite; the process is locked afterwards. The map is empty, or has the UUID (`GPU-…`) of
        every GPU that was checkpointed, and that of the one to restore it onto."""

    def unlock(self, pid: int, *, timeout_seconds: float = ANSWER_SECONDS) -> None: ...

    def close(self) -> None:
        """Idempotent."""


_WORDS = {
    Action.STATE: "tell the state of",
    Action.RESTORE_THREAD: "tell the restore thread of",
    Action.LOCK: "lock",
    Action.CHECKPOINT: "checkpoint",
    Action.RESTORE: "restore",
    Action.UNLOCK: "unlock",
}
_HINTS = {
    INVALID_VALUE: "it holds no CUDA, or it has ended",
    OUT_OF_MEMORY: "make room on the GPU and start the server anew: such a restore cannot be repeated",
    NOT_INITIALIZED: "it is just starting CUDA, or ending: try again",
    OPERATING_SYSTEM: "run as root in the host's PID namespace; a restore that failed cannot be repeated",
    ILLEGAL_STATE: "somebody else is at it: `cuda-checkpoint --get-state` tells its state",
    NOT_READY: "its GPU did not come to rest in time: end its requests first, or wait longer",
    NOT_SUPPORTED: "the driver does not checkpoint managed memory, MIG, MPS and, before 610, CUDA IPC",
}
_HINTS_OF_STEPS = {
    (
        Action.CHECKPOINT,
        OUT_OF_MEMORY,
    ): "as much of the host's memory must be free as the process holds on GPUs",
    (
        Action.RESTORE,
        INVALID_VALUE,
    ): "a device map must name every GPU that the process had at its checkpoint, "
    "and one like it for each; without a map, there must be as many here as there were",
}


def failure(step: Action, pid: int, number: int, name: str, text: str) -> CudaError:
    """The error for what the driver answered."""
    error = CudaError(
        f"CUDA could not {_WORDS[step]} process {pid}",
        cause=f"{name} ({number}): {text}" if number else text,
        hint=_HINTS_OF_STEPS.get((step, number)) or _HINTS.get(number, ""),
    )
    error.number = number
    return error


def late(step: Action, pid: int, seconds: float, cause: str = "") -> CudaError:
    """The error for no answer in time."""
    return CudaError(
        f"CUDA did not {_WORDS[step]} process {pid} within {seconds:.3g} s",
        cause=cause,
        hint="wait longer; processes that share GPU memory (NCCL, CUDA IPC) can block each other for ever",
    )


def checked(device_map: Mapping[str, str], pid: int) -> dict[str, str]:
    """The map, of UUIDs in the form that the driver prints."""
    for uuid in (*device_map, *device_map.values()):
        if not _UUID.fullmatch(uuid):
            raise failure(Action.RESTORE, pid, 0, "", f"{uuid!r} is no UUID of a whole GPU")
    return dict(device_map)


def holds_none(pid: int, number: int, *, proc: Path = Path("/proc")) -> bool:
    """Whether it follows that a process holds no CUDA, when it was asked for its restore thread in vain.

    The driver answers INVALID_VALUE then, or NOT_INITIALIZED if the process has loaded it without starting
    it. But that one also comes while CUDA starts or ends, and a dump without the GPU's state would be worth
    nothing; only cuInit opens /dev/nvidia-uvm.
    """
    if number != NOT_INITIALIZED:
        return number == INVALID_VALUE
    try:
        descriptors = list((proc / str(pid) / "fd").iterdir())
    except OSError:
        return not (proc / str(pid)).exists()
    for descriptor in descriptors:
        with contextlib.suppress(FileNotFoundError):  # it was just closed
            if str(descriptor.readlink()).startswith("/dev/nvidia-uvm"):
                return False
    return True
