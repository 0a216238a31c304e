# SPDX-License-Identifier: Apache-2.0
"""Checkpoint CUDA with NVIDIA's `cuda-checkpoint`, for drivers without the API (555 to 565).

Each call starts the driver again, which takes seconds. The exit status is 1 after any failure, so we read the
message instead. libcuda 555 prints these:

    Error initializing CUDA: "…"                             about cuda-checkpoint itself, not the process
    Error getting process state for process ID 42: "…"
    Could not find restore thread for process ID 42          the result stays unknown
    Could not lock on process ID 42: "…"
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from msgspec import Struct

from rekindle.cuda.backend import (
    ANSWER_SECONDS,
    STEP_SECONDS,
    Action,
    State,
    all_devices,
    check_device_map,
    failure,
    holds_none,
    timed_out,
)
from rekindle.errors import CapabilityError, CudaError
from rekindle.files import write_atomically
from rekindle.home import Home
from rekindle.node import gpu
from rekindle.run import run

_HELP_SECONDS = 20.0
_START_SECONDS = 60.0  # for cuInit, on a node of many GPUs
_TIMED_OUT = 124  # from rekindle.run
_DRIVER_WITH_MAPS = 580
_NO_THREAD = "Could not find restore thread for process ID"
_ABOUT_PROCESS = ("Could not ", "Error getting process state for ")
_HINT = "get it from https://github.com/NVIDIA/cuda-checkpoint, or set REKINDLE_CUDA_CHECKPOINT to yours"

# cuGetErrorString's texts for the results that checkpointing can return.
_RESULTS = {
    "invalid argument": (1, "CUDA_ERROR_INVALID_VALUE"),
    "out of memory": (2, "CUDA_ERROR_OUT_OF_MEMORY"),
    "initialization error": (3, "CUDA_ERROR_NOT_INITIALIZED"),
    "driver shutting down": (4, "CUDA_ERROR_DEINITIALIZED"),
    "no CUDA-capable device is detected": (100, "CUDA_ERROR_NO_DEVICE"),
    "invalid device ordinal": (101, "CUDA_ERROR_INVALID_DEVICE"),
    "OS call failed or operation not supported on this OS": (304, "CUDA_ERROR_OPERATING_SYSTEM"),
    "the operation cannot be performed in the present state": (401, "CUDA_ERROR_ILLEGAL_STATE"),
    "device not ready": (600, "CUDA_ERROR_NOT_READY"),
    "operation not permitted": (800, "CUDA_ERROR_NOT_PERMITTED"),
    "operation not supported": (801, "CUDA_ERROR_NOT_SUPPORTED"),
    "system not yet initialized": (802, "CUDA_ERROR_SYSTEM_NOT_READY"),
    "unknown error": (999, "CUDA_ERROR_UNKNOWN"),
}


class Utility(Struct, frozen=True, kw_only=True):
    """The backend that runs cuda-checkpoint. `maps` tells whether it has --device-map."""

    path: Path
    version: str
    maps: bool

    @classmethod
    def find(cls, home: Home) -> Self:
        """Return `$REKINDLE_CUDA_CHECKPOINT`, or else the one on PATH.

        Remembers its features until the file changes. Raises CapabilityError if there is none or it is too
        old.
        """
        chosen = os.environ.get("REKINDLE_CUDA_CHECKPOINT") or shutil.which("cuda-checkpoint")
        if not chosen:
            raise CapabilityError("cuda-checkpoint is not on PATH", hint=_HINT)
        path = Path(chosen).absolute()
        text = _help(path, home.tools / "cuda-checkpoint-help.json")
        match = re.search(r"Version (\S+?)\.? ", text)
        version = match[1] if match else "of an unknown version"
        if "--action" not in text:
            raise CapabilityError(f"{path} {version} has no --action: it is older than 555", hint=_HINT)
        return cls(path=path, version=version, maps="--device-map" in text)

    @property
    def name(self) -> str:
        return "utility"

    def problem(self) -> str:
        """Return why the driver does not start in cuda-checkpoint; "" if it does. Takes seconds."""
        try:
            self.restore_thread(os.getpid(), timeout_seconds=_START_SECONDS)
        except CudaError as error:
            return error.cause
        return ""

    def state(self, pid: int, *, timeout_seconds: float = ANSWER_SECONDS) -> State:
        output = self._call(Action.STATE, pid, ["--get-state"], timeout_seconds)
        for line in reversed(output.splitlines()):  # messages of the driver may come first
            with contextlib.suppress(ValueError):
                return State(line.strip())
        raise failure(Action.STATE, pid, 0, "", f"it printed {output.strip()!r}")

    def restore_thread(self, pid: int, *, timeout_seconds: float = ANSWER_SECONDS) -> int | None:
        try:
            output = self._call(Action.RESTORE_THREAD, pid, ["--get-restore-tid"], timeout_seconds)
        except CudaError as error:
            if _NO_THREAD in error.cause and holds_none(pid, 0):
                return None
            raise
        for line in reversed(output.splitlines()):
            if line.strip().isdecimal():
                return int(line)
        raise failure(Action.RESTORE_THREAD, pid, 0, "", f"it printed {output.strip()!r}")

    def lock(self, pid: int, timeout_seconds: float) -> None:
        words = ["--action", "lock", "--timeout", str(max(1, int(timeout_seconds * 1000)))]
        self._call(Action.LOCK, pid, words, timeout_seconds + _START_SECONDS)

    def checkpoint(self, pid: int, *, timeout_seconds: float = STEP_SECONDS) -> None:
        self._call(Action.CHECKPOINT, pid, ["--action", "checkpoint"], timeout_seconds)

    def restore(
        self, pid: int, device_map: Mapping[str, str], *, timeout_seconds: float = STEP_SECONDS
    ) -> None:
        words = ["--action", "restore"]
        if device_map:
            pairs = [f"{old}={new}" for old, new in check_device_map(device_map, pid).items()]
            self._require_maps(pid)
            words += ["--device-map", ",".join(pairs)]
        self._call(Action.RESTORE, pid, words, timeout_seconds)

    def unlock(self, pid: int, *, timeout_seconds: float = ANSWER_SECONDS) -> None:
        self._call(Action.UNLOCK, pid, ["--action", "unlock"], timeout_seconds)

    def close(self) -> None:
        pass

    def _require_maps(self, pid: int) -> None:
        """Raise CudaError for a driver before 580, which ignores the map and restores onto any GPU."""
        driver = gpu.probe().driver
        major = int(driver.partition(".")[0]) if driver.partition(".")[0].isdecimal() else _DRIVER_WITH_MAPS
        if not self.maps or major < _DRIVER_WITH_MAPS:
            raise CudaError(
                f"cannot restore process {pid} onto other GPUs on this node",
                cause=f"that needs 580; found {self.path} {self.version} and driver {driver or '?'}",
                hint="update the driver and cuda-checkpoint to 580 or newer, or restore onto the same GPUs",
            )

    def _call(self, step: Action, pid: int, words: list[str], seconds: float) -> str:
        """Run cuda-checkpoint and return its output. Raises CudaError."""
        argv = [str(self.path), *words, "--pid", str(pid)]
        try:
            done = run(argv, timeout=seconds, env=all_devices(os.environ))
        except OSError as error:
            raise failure(step, pid, 0, "", str(error)) from error
        if done.status == 0:
            return done.output
        output = done.output.strip()
        quoted = re.search(r': "([^"]+)"\s*$', output)
        about_process = output.rpartition("\n")[2].startswith(_ABOUT_PROCESS)
        number, name = _RESULTS.get(quoted[1], (0, "")) if quoted and about_process else (0, "")
        if done.status == _TIMED_OUT and not number:
            raise timed_out(step, pid, seconds, "cuda-checkpoint was still running and was killed")
        text = quoted[1] if quoted and number else output or f"it exited with status {done.status}"
        refused = failure(step, pid, number, name, text)
        refused.command = tuple(argv)
        raise refused


def _help(path: Path, known: Path) -> str:
    """Return the output of --help, from the cache in `known` if the file has not changed."""
    try:
        status = path.stat()
        identity = f"{path} {status.st_size} {status.st_mtime_ns}"
        with contextlib.suppress(OSError, ValueError, AttributeError):
            if isinstance(text := json.loads(known.read_bytes()).get(identity), str):
                return text
        done = run([str(path), "--help"], timeout=_HELP_SECONDS)
    except OSError as error:
        raise CapabilityError(f"cannot run {path}: {error}", hint=_HINT) from error
    if done.status == 0:
        with contextlib.suppress(OSError):
            write_atomically(known, json.dumps({identity: done.output}).encode())
    return done.output
