# SPDX-License-Identifier: Apache-2.0
"""Checkpoint CUDA with the driver's own API, in a client that is started once (rekindle/cuda/client.py)."""

import contextlib
import itertools
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from rekindle.cuda import client
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
from rekindle.errors import CudaError
from rekindle.run import TimeoutExpired, end_group, run, spawn

_START_SECONDS = 120.0
_END_SECONDS = 5.0
# How much later than its timeout a lock may be answered.
_SLACK_SECONDS = 5.0
_VERSION_WITH_MAPS = 13000  # CUDA 13.0, which is driver 580
_STATES = (State.RUNNING, State.LOCKED, State.CHECKPOINTED, State.FAILED)  # CUprocessState's order


def problem() -> str:
    """Return why the driver cannot be used; "" if nothing is wrong as far as it shows without a start."""
    argv = [sys.executable, "-I", "-S", "-B", client.__file__, "--look"]
    looked = run(argv, timeout=ANSWER_SECONDS)
    return "" if looked.status == 0 else looked.output.strip() or f"status {looked.status}"


class Driver:
    """The backend that calls the driver in a client.

    The client starts at once and is replaced if it dies. The driver in it takes seconds to start, and answers
    most calls before (rekindle/cuda/client.py).
    """

    name = "driver"

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._client = _Client()

    def wait_for_library(self) -> None:
        """Wait until the driver's library is loaded, or `problem` says why it cannot be used."""
        self._client.wait_for_library(_START_SECONDS)

    def wait(self) -> None:
        """Wait until the driver has started, or `problem` says why it has not."""
        if not self._client.wait(_START_SECONDS):
            self._client.problem = f"the driver did not start within {_START_SECONDS:.0f} s"

    @property
    def problem(self) -> str:
        """Why the driver cannot be used; "" if it can, or if that is not known before `wait`."""
        return self._client.problem

    @property
    def started(self) -> bool:
        """Whether a driver that can checkpoint was found and started, even if the start failed."""
        return self._client.started

    @property
    def version(self) -> int:
        """The newest CUDA version that the driver supports: 13000 for 13.0."""
        return self._client.version

    def state(self, pid: int, *, timeout_seconds: float = ANSWER_SECONDS) -> State:
        value = self._ask(Action.STATE, pid, timeout_seconds)
        if not 0 <= value < len(_STATES):
            raise failure(Action.STATE, pid, 0, "", f"unknown state {value}")
        return _STATES[value]

    def restore_thread(self, pid: int, *, timeout_seconds: float = ANSWER_SECONDS) -> int | None:
        try:
            return self._ask(Action.RESTORE_THREAD, pid, timeout_seconds)
        except CudaError as error:
            if holds_none(pid, error.number):
                return None
            raise

    def lock(self, pid: int, timeout_seconds: float) -> None:
        self._ask(Action.LOCK, pid, timeout_seconds)

    def checkpoint(self, pid: int, *, timeout_seconds: float = STEP_SECONDS) -> None:
        self._ask(Action.CHECKPOINT, pid, timeout_seconds)

    def restore(
        self, pid: int, device_map: Mapping[str, str], *, timeout_seconds: float = STEP_SECONDS
    ) -> None:
        self._ask(Action.RESTORE, pid, timeout_seconds, map=list(check_device_map(device_map, pid).items()))

    def unlock(self, pid: int, *, timeout_seconds: float = ANSWER_SECONDS) -> None:
        self._ask(Action.UNLOCK, pid, timeout_seconds)

    def close(self) -> None:
        self._client.close()

    def _ask(self, step: Action, pid: int, seconds: float, **rest: Any) -> int:
        deadline = time.monotonic() + seconds
        with self._lock:
            if self._client.ended:
                self._client.close()
                self._client = _Client()
            current = self._client
        if not current.wait_for_library(seconds):
            raise timed_out(step, pid, seconds, "the driver has not been loaded yet")
        if current.problem:
            raise failure(step, pid, 0, "", current.problem)
        if rest.get("map") and current.version < _VERSION_WITH_MAPS:
            known = f"CUDA {current.version // 1000}.{current.version % 1000 // 10}"
            raise CudaError(
                f"cannot restore process {pid} onto other GPUs on this node",
                cause=f"that needs CUDA 13.0; the driver supports {known}",
                hint="update the driver to 580 or newer, or restore onto the same GPUs",
            )
        return current.ask(step, pid, deadline, seconds, rest)


class _Call:
    """A call sent to the client. If it is over without an answer, the client has exited."""

    def __init__(self, step: Action) -> None:
        self.step = step
        self.over = threading.Event()
        self.answer: dict[str, Any] | None = None


class _Client:
    """One client process, from its start to its exit."""

    def __init__(self) -> None:
        self.problem = ""
        self.started = False
        self.version = 0
        self.ended = False
        self._loaded, self._start_over = threading.Event(), threading.Event()
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._calls: dict[int, _Call] = {}
        self._latest: dict[int, _Call] = {}  # by PID
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        program = [sys.executable, "-I", "-S", "-B", client.__file__]
        try:
            self._process = spawn(
                [*program, str(theirs.fileno()), str(os.getpid())],
                env=all_devices(os.environ),
                pass_fds=[theirs.fileno()],
                stderr=2,
            )
        except BaseException:
            self._control.close()
            raise
        finally:
            theirs.close()
        self._reader = threading.Thread(target=self._read, name="cuda", daemon=True)
        self._reader.start()

    def wait_for_library(self, seconds: float) -> bool:
        """Wait until the driver's library is loaded or could not be; return False after a timeout."""
        return self._loaded.wait(seconds)

    def wait(self, seconds: float) -> bool:
        """Wait until the driver has started or failed to; return False after a timeout."""
        return self._start_over.wait(seconds)

    def ask(self, step: Action, pid: int, deadline: float, seconds: float, rest: Mapping[str, Any]) -> int:
        """Make a call and return its value. Raises CudaError."""
        number, call = self._enter(step, pid, deadline, seconds)
        left = max(0.001, deadline - time.monotonic())
        message: dict[str, Any] = {"id": number, "call": step, "pid": pid, **rest}
        if step is Action.LOCK:
            message["timeout_ms"] = max(1, int(left * 1000))
            left += _SLACK_SECONDS
        with contextlib.suppress(OSError):  # then the client has exited, and the reader notices
            self._control.send(json.dumps(message).encode())
        if not call.over.wait(left):
            raise timed_out(step, pid, seconds, "the driver has not finished")
        if call.answer is None:
            raise failure(step, pid, 0, "", self._describe_exit())
        if status := call.answer["status"]:
            raise failure(step, pid, status, call.answer["name"], call.answer["text"])
        return int(call.answer["value"])

    def _enter(self, step: Action, pid: int, deadline: float, seconds: float) -> tuple[int, _Call]:
        """Wait for the previous call for the process, then register a new one."""
        while True:
            with self._lock:
                if self.ended:
                    raise failure(step, pid, 0, "", self._describe_exit())
                before = self._latest.get(pid)
                if before is None or before.over.is_set():
                    number, call = next(self._numbers), _Call(step)
                    self._calls[number] = self._latest[pid] = call
                    return number, call
            if not before.over.wait(max(0.0, deadline - time.monotonic())):
                raise timed_out(step, pid, seconds, f"the driver has not finished its {before.step}")

    def _read(self) -> None:
        """Receive the client's messages until it exits."""
        while True:
            try:
                content = self._control.recv(client.MESSAGE_BYTES)
            except OSError:
                content = b""
            if not content:
                break
            message = json.loads(content)
            if "version" in message:
                self.version = message["version"]
                self._loaded.set()
                continue
            if "started" in message:
                self.problem, self.started = message.get("problem", ""), message["started"]
                self._start_over.set()
                self._loaded.set()
                continue
            with self._lock:
                call = self._calls.pop(message["id"])
            call.answer = message
            call.over.set()
        with self._lock:
            self.ended = True
            left, self._calls = self._calls, {}
        for call in left.values():
            call.over.set()
        if not self._start_over.is_set():
            self.problem = self._describe_exit()
            self._start_over.set()
            self._loaded.set()

    def _describe_exit(self) -> str:
        try:
            return f"the driver's client exited with status {self._process.wait(_END_SECONDS)}"
        except TimeoutExpired:
            return "the driver's client closed its connection"

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._control.shutdown(socket.SHUT_RDWR)
        self._reader.join()
        try:
            self._process.wait(_END_SECONDS)  # it finishes its calls first
        except TimeoutExpired:
            end_group(self._process)
        self._control.close()
