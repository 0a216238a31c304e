# SPDX-License-Identifier: Apache-2.0
"""CUDA's checkpointing by the driver's own API, in a client that is started once: rekindle/cuda/client.py."""

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
from rekindle.cuda.door import (
    ANSWER_SECONDS,
    STEP_SECONDS,
    Action,
    State,
    checked,
    failure,
    holds_none,
    late,
)
from rekindle.errors import CudaError
from rekindle.run import TimeoutExpired, end_group, run, spawn

_START_SECONDS = 120.0
_END_SECONDS = 5.0
# What the answer to a lock may take longer than the lock itself.
_SLACK_SECONDS = 5.0
_VERSION_WITH_MAPS = 13000  # CUDA 13.0, which is driver 580
_STATES = (State.RUNNING, State.LOCKED, State.CHECKPOINTED, State.FAILED)  # by CUprocessState


def look() -> str:
    """Why the driver cannot be used, as far as it shows without starting it; empty if nothing does."""
    looked = run([sys.executable, "-I", "-S", "-B", client.__file__, "--look"], timeout=ANSWER_SECONDS)
    return "" if looked.status == 0 else looked.output.strip() or f"status {looked.status}"


class Driver:
    """The door. The client starts at once, and is started anew if it dies; the driver in it takes seconds."""

    name = "driver"

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._client = _Client()

    def look(self) -> None:
        """Waits until it is known whether there is a driver to start; if not, `lack` says why."""
        self._client.look(_START_SECONDS)

    def wait(self) -> None:
        """Waits until the driver has started."""
        if not self._client.wait(_START_SECONDS):
            self._client.lack = f"the driver has not started within {_START_SECONDS:.0f} s"

    @property
    def lack(self) -> str:
        """Why the driver cannot be used, after `wait`; empty if it can, or if that is not known yet."""
        return self._client.lack

    @property
    def started(self) -> bool:
        """Whether a driver that can checkpoint was there, and was started, if in vain."""
        return self._client.started

    @property
    def version(self) -> int:
        """The newest CUDA that the driver knows: 13000 for 13.0."""
        return self._client.version

    def state(self, pid: int, *, timeout_seconds: float = ANSWER_SECONDS) -> State:
        value = self._ask(Action.STATE, pid, timeout_seconds)
        if not 0 <= value < len(_STATES):
            raise failure(Action.STATE, pid, 0, "", f"it is in the state {value}, which is not known here")
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
        self._ask(Action.RESTORE, pid, timeout_seconds, map=list(checked(device_map, pid).items()))

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
        if not current.wait(seconds):
            raise late(step, pid, seconds, "the driver has not started yet")
        if current.lack:
            raise failure(step, pid, 0, "", current.lack)
        if rest.get("map") and current.version < _VERSION_WITH_MAPS:
            known = f"CUDA {current.version // 1000}.{current.version % 1000 // 10}"
            raise CudaError(
                f"process {pid} cannot be restored onto other GPUs here",
                cause=f"this driver knows {known}, and that came with 13.0",
                hint="update the driver to 580 or newer, or restore onto the same GPUs",
            )
        return current.ask(step, pid, deadline, seconds, rest)


class _Call:
    """One that was sent to the client. Without an answer, the client has ended."""

    def __init__(self, step: Action) -> None:
        self.step = step
        self.over = threading.Event()
        self.answer: dict[str, Any] | None = None


class _Client:
    """One client, from its start to its end."""

    def __init__(self) -> None:
        self.lack = ""
        self.started = False
        self.version = 0
        self.ended = False
        self._found, self._settled = threading.Event(), threading.Event()
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._calls: dict[int, _Call] = {}
        self._latest: dict[int, _Call] = {}  # by process
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        program = [sys.executable, "-I", "-S", "-B", client.__file__]
        try:
            self._process = spawn(
                [*program, str(theirs.fileno()), str(os.getpid())], pass_fds=[theirs.fileno()], stderr=2
            )
        except BaseException:
            self._control.close()
            raise
        finally:
            theirs.close()
        self._reader = threading.Thread(target=self._read, name="cuda", daemon=True)
        self._reader.start()

    def look(self, seconds: float) -> None:
        """Waits until the driver was found, or not."""
        self._found.wait(seconds)

    def wait(self, seconds: float) -> bool:
        """Waits until the driver has started, or said why it cannot; False if time is over."""
        return self._settled.wait(seconds)

    def ask(self, step: Action, pid: int, deadline: float, seconds: float, rest: Mapping[str, Any]) -> int:
        """The value that a call gives."""
        number, call = self._enter(step, pid, deadline, seconds)
        left = max(0.001, deadline - time.monotonic())
        message: dict[str, Any] = {"id": number, "call": step, "pid": pid, **rest}
        if step is Action.LOCK:
            message["timeout_ms"] = max(1, int(left * 1000))
            left += _SLACK_SECONDS
        with contextlib.suppress(OSError):  # then it has ended, as the reader finds, too
            self._control.send(json.dumps(message).encode())
        if not call.over.wait(left):
            raise late(step, pid, seconds, "the driver is still at it")
        if call.answer is None:
            raise failure(step, pid, 0, "", self._end_in_words())
        if status := call.answer["status"]:
            raise failure(step, pid, status, call.answer["name"], call.answer["text"])
        return int(call.answer["value"])

    def _enter(self, step: Action, pid: int, deadline: float, seconds: float) -> tuple[int, _Call]:
        """A call of one's own, once the one before for that process is over."""
        while True:
            with self._lock:
                if self.ended:
                    raise failure(step, pid, 0, "", self._end_in_words())
                before = self._latest.get(pid)
                if before is None or before.over.is_set():
                    number, call = next(self._numbers), _Call(step)
                    self._calls[number] = self._latest[pid] = call
                    return number, call
            if not before.over.wait(max(0.0, deadline - time.monotonic())):
                raise late(step, pid, seconds, f"the driver is still at its {before.step}")

    def _read(self) -> None:
        """Takes in what the client says, until it ends."""
        while True:
            try:
                content = self._control.recv(client.MESSAGE_BYTES)
            except OSError:
                content = b""
            if not content:
                break
            message = json.loads(content)
            if "loaded" in message:
                self._found.set()
                continue
            if "id" not in message:
                self.version, self.lack = message.get("version", 0), message.get("lack", "")
                self.started = message.get("started", True)
                self._settled.set()
                self._found.set()
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
        if not self._settled.is_set():
            self.lack = self._end_in_words()
            self._settled.set()
            self._found.set()

    def _end_in_words(self) -> str:
        try:
            return f"the client with the driver ended with status {self._process.wait(_END_SECONDS)}"
        except TimeoutExpired:
            return "the client with the driver closed its connection"

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._control.shutdown(socket.SHUT_RDWR)
        self._reader.join()
        try:
            self._process.wait(_END_SECONDS)  # it ends its calls first
        except TimeoutExpired:
            end_group(self._process)
        self._control.close()
