# SPDX-License-Identifier: Apache-2.0
"""Serve the CUDA driver's checkpoint API on a socket, as a program that `rekindle.cuda.driver` starts.

It runs by path under `python -I -S`, imports only the standard library, and lives as long as the command
that started it. Calls are made as soon as the library is loaded: those for other processes do not need
cuInit, as far as is known. It is called in the background all the same, once (2.7 s on an H100 node): a call
that is answered with NOT_INITIALIZED before it is over is made again after it.

rekindle talks to it over a SOCK_SEQPACKET socket, one JSON object per message, with many calls in flight:

    to the client                                        from the client
    -                                                    {"version": 13000} when the library is loaded,
                                                         {"started": true} after cuInit; either can be
                                                         {"problem": text, "started": bool} instead
    {"id", "call": "state" | "restore-thread", "pid"}    {"id", "status", "name", "text", "value"}
    {"id", "call": "lock", "pid", "timeout_ms"}          the same; `status` is the driver's, a CUresult
    {"id", "call": "checkpoint" | "unlock", "pid"}
    {"id", "call": "restore", "pid", "map": [[UUID, UUID]…]}

It exits when rekindle does, but lets running calls finish for up to half a minute: an interrupted call can
leave the process and the driver in different states (checkpoint-restore/criu#2547).

Prototypes and structures are those of cuda.h since 12.8; the fields that 13.0 added to
CUcheckpointRestoreArgs were reserved and zero before.
"""

import contextlib
import ctypes
import json
import os
import socket
import sys
import threading
import time
from select import POLLIN, poll

MESSAGE_BYTES = 1 << 16
FAREWELL_SECONDS = 30.0
NOT_INITIALIZED, UNKNOWN = 3, 999
CHECKPOINTING = (
    "cuCheckpointProcessGetRestoreThreadId",
    "cuCheckpointProcessGetState",
    "cuCheckpointProcessLock",
    "cuCheckpointProcessCheckpoint",
    "cuCheckpointProcessRestore",
    "cuCheckpointProcessUnlock",
)


class LockArgs(ctypes.Structure):
    _fields_ = (
        ("timeout_ms", ctypes.c_uint),  # 0: none
        ("reserved0", ctypes.c_uint),
        ("reserved1", ctypes.c_uint64 * 7),
    )


class CheckpointArgs(ctypes.Structure):
    """Also CUcheckpointUnlockArgs."""

    _fields_ = (("reserved", ctypes.c_uint64 * 8),)


class GpuPair(ctypes.Structure):
    _fields_ = (("old", ctypes.c_ubyte * 16), ("new", ctypes.c_ubyte * 16))


class RestoreArgs(ctypes.Structure):
    _fields_ = (
        ("pairs", ctypes.POINTER(GpuPair)),
        ("count", ctypes.c_uint),
        ("reserved", ctypes.c_char * (52 - ctypes.sizeof(ctypes.c_void_p))),
        ("reserved1", ctypes.c_uint64),
    )


class UnusableError(Exception):
    """The driver cannot be used. `started` tells whether it got as far as cuInit."""

    def __init__(self, text: str, *, started: bool) -> None:
        super().__init__(text)
        self.started = started


class LoadedDriver:
    """libcuda, loaded. Calls may run in several threads, since ctypes releases the GIL."""

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise UnusableError(str(error), started=False) from None
        missing = [name for name in CHECKPOINTING if not hasattr(self._library, name)]
        if missing:
            raise UnusableError(
                f"libcuda.so.1 has no {missing[0]}: the driver is older than 570", started=False
            )

    def start(self) -> None:
        """Initialize the driver, which takes seconds. Raises UnusableError."""
        if status := self._library.cuInit(0):
            name, text = self.describe(status)
            raise UnusableError(f"cuInit: {name} ({status}): {text}", started=True)

    def version(self) -> int:
        """Return the newest CUDA version that the driver supports; needs no start."""
        version = ctypes.c_int()
        self._library.cuDriverGetVersion(ctypes.byref(version))
        return version.value

    def describe(self, status: int) -> tuple[str, str]:
        """Return the driver's name and description of a result."""
        name, text = ctypes.c_char_p(), ctypes.c_char_p()
        self._library.cuGetErrorName(status, ctypes.byref(name))
        self._library.cuGetErrorString(status, ctypes.byref(text))
        return (name.value or b"CUDA_ERROR").decode(), (text.value or b"unknown error").decode()

    def call(self, request: dict) -> tuple[int, int]:  # type: ignore[type-arg]
        """Make one call; return its result and its value."""
        pid, value = request["pid"], ctypes.c_int()
        match request["call"]:
            case "state":
                status = self._library.cuCheckpointProcessGetState(pid, ctypes.byref(value))
            case "restore-thread":
                status = self._library.cuCheckpointProcessGetRestoreThreadId(pid, ctypes.byref(value))
            case "lock":
                lock = LockArgs(timeout_ms=request["timeout_ms"])
                status = self._library.cuCheckpointProcessLock(pid, ctypes.byref(lock))
            case "checkpoint":
                status = self._library.cuCheckpointProcessCheckpoint(pid, ctypes.byref(CheckpointArgs()))
            case "restore":
                pairs = [GpuPair(old=uuid(old), new=uuid(new)) for old, new in request["map"]]
                array = (GpuPair * len(pairs))(*pairs)
                restore = RestoreArgs(pairs=array if pairs else None, count=len(pairs))
                status = self._library.cuCheckpointProcessRestore(pid, ctypes.byref(restore))
            case "unlock":
                status = self._library.cuCheckpointProcessUnlock(pid, ctypes.byref(CheckpointArgs()))
            case other:
                raise ValueError(other)
        return status, value.value


def uuid(text: str) -> "ctypes.Array[ctypes.c_ubyte]":
    return (ctypes.c_ubyte * 16)(*bytes.fromhex(text.removeprefix("GPU-").replace("-", "")))


class DriverClient:
    """Answers rekindle's calls, each in a thread."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._finished = threading.Semaphore(0)
        self._begun = 0
        self._driver: LoadedDriver | None = None
        self._problem = ""
        self._loaded, self._start_over = threading.Event(), threading.Event()

    def start(self) -> None:
        """Load the library, start the driver, and report both."""
        try:
            self._driver = LoadedDriver()
            self._send({"version": self._driver.version()})
            self._loaded.set()
            self._driver.start()
            self._send({"started": True})
        except UnusableError as error:
            self._problem = str(error)
            self._send({"problem": self._problem, "started": error.started})
        finally:
            self._loaded.set()
            self._start_over.set()

    def begin(self, message: bytes) -> None:
        self._begun += 1
        threading.Thread(target=self._answer, args=[json.loads(message)], daemon=True).start()

    def finish(self, seconds: float) -> None:
        """Wait for the running calls, for at most `seconds`."""
        deadline = time.monotonic() + seconds
        for _ in range(self._begun):
            if not self._finished.acquire(timeout=max(0.0, deadline - time.monotonic())):
                return

    def _answer(self, request: dict) -> None:  # type: ignore[type-arg]
        try:
            status, value, name, text = self._call(request)
            self._send({"id": request["id"], "status": status, "name": name, "text": text, "value": value})
        finally:
            self._finished.release()

    def _call(self, request: dict) -> tuple[int, int, str, str]:  # type: ignore[type-arg]
        """Make a call, again after the driver's start if needed; return result, value, name and text."""
        self._loaded.wait()
        driver, before_start = self._driver, not self._start_over.is_set()
        if driver is None:
            return UNKNOWN, 0, "CUDA_ERROR_UNKNOWN", "the driver could not be loaded"
        status, value = driver.call(request)
        if status == NOT_INITIALIZED and before_start:
            self._start_over.wait()
            if self._problem:
                return UNKNOWN, 0, "CUDA_ERROR_UNKNOWN", self._problem
            status, value = driver.call(request)
        return (status, value, *driver.describe(status))

    def _send(self, message: dict) -> None:  # type: ignore[type-arg]
        # If rekindle is gone, the main thread notices and exits.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._control.send(json.dumps(message).encode())


def receive(control: socket.socket) -> bytes:
    try:
        return control.recv(MESSAGE_BYTES)
    except ConnectionResetError:  # rekindle exited before it had read everything
        return b""


def report_problem() -> int:
    """Print why the driver cannot be used, without starting it; return the exit status."""
    try:
        LoadedDriver()
    except UnusableError as error:
        print(error, flush=True)
        return 1
    return 0


def main() -> int:
    control = socket.socket(fileno=int(sys.argv[1]))
    control.set_inheritable(False)
    parent = int(sys.argv[2])
    # Not PR_SET_PDEATHSIG: that signal comes when the thread that started us ends.
    parent_exit = os.pidfd_open(parent)
    if os.getppid() != parent:
        return 1
    client = DriverClient(control)
    threading.Thread(target=client.start, daemon=True).start()
    poller = poll()
    poller.register(control, POLLIN)
    poller.register(parent_exit, POLLIN)
    while True:
        ready = [fd for fd, _ in poller.poll()]
        if control.fileno() in ready and (message := receive(control)):
            client.begin(message)
            continue
        client.finish(FAREWELL_SECONDS)
        return 0


if __name__ == "__main__":
    status = report_problem() if sys.argv[1:] == ["--look"] else main()
    os._exit(status)  # not sys.exit: a hanging call would keep the interpreter alive
