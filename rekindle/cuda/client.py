# SPDX-License-Identifier: Apache-2.0
"""The CUDA driver's checkpointing, at a socket. A program of its own: `rekindle/cuda/driver.py` starts it.

It runs by path under `python -I -S`, imports the standard library only, and lives as long as the command
that started it. So the driver's start (2.7 s on an H100 node) is paid once, while that command does other
things.

rekindle talks to it over a SOCK_SEQPACKET socket, a JSON object a message, many calls at once:

    to the client                                        from the client
    -                                                    {"loaded": true}, if there is a driver for us; then
                                                         {"version": 13000} or {"lack": text, "started": bool}
    {"id", "call": "state" | "restore-thread", "pid"}    {"id", "status", "name", "text", "value"}
    {"id", "call": "lock", "pid", "timeout_ms"}          the same; `status` is the driver's, a CUresult
    {"id", "call": "checkpoint" | "unlock", "pid"}
    {"id", "call": "restore", "pid", "map": [[UUID, UUID]…]}

It ends with rekindle, but not in the middle of a call, if that takes no longer than half a minute: one that
is cut off can leave the process and the driver at odds (checkpoint-restore/criu#2547).

Prototypes and structures are those of cuda.h since 12.8; what 13.0 added to CUcheckpointRestoreArgs was
reserved, and zero, before.
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
UNKNOWN = 999
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


class LackError(Exception):
    """Why the driver cannot be used. `started` says whether it was tried."""

    def __init__(self, text: str, *, started: bool) -> None:
        super().__init__(text)
        self.started = started


class LoadedDriver:
    """libcuda. ctypes lets other threads run during a call."""

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise LackError(str(error), started=False) from None
        missing = [name for name in CHECKPOINTING if not hasattr(self._library, name)]
        if missing:
            raise LackError(f"libcuda.so.1 has no {missing[0]}: the driver is older than 570", started=False)

    def start(self) -> int:
        """Takes seconds; returns the newest CUDA that it knows."""
        if status := self._library.cuInit(0):
            name, text = self.words(status)
            raise LackError(f"cuInit: {name} ({status}): {text}", started=True)
        version = ctypes.c_int()
        self._library.cuDriverGetVersion(ctypes.byref(version))
        return version.value

    def words(self, status: int) -> tuple[str, str]:
        """The driver's name of a result, and what it says of it."""
        name, text = ctypes.c_char_p(), ctypes.c_char_p()
        self._library.cuGetErrorName(status, ctypes.byref(name))
        self._library.cuGetErrorString(status, ctypes.byref(text))
        return (name.value or b"CUDA_ERROR").decode(), (text.value or b"unknown error").decode()

    def call(self, request: dict) -> tuple[int, int]:  # type: ignore[type-arg]
        """The result of one call, and the value that it gives."""
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


class BackendClient:
    """Answers rekindle: a thread for each call."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._under_way = threading.Semaphore(0)
        self._begun = 0
        self._driver: LoadedDriver | None = None
        self._settled = threading.Event()

    def start(self) -> None:
        """Starts the driver, and says how that went."""
        try:
            driver = LoadedDriver()
            self._say({"loaded": True})
            version = driver.start()
            self._driver = driver
            self._say({"version": version})
        except LackError as lack:
            self._say({"lack": str(lack), "started": lack.started})
        finally:
            self._settled.set()

    def take(self, message: bytes) -> None:
        self._begun += 1
        threading.Thread(target=self._answer, args=[json.loads(message)], daemon=True).start()

    def finish(self, seconds: float) -> None:
        """Waits for the calls under way, but no longer."""
        deadline = time.monotonic() + seconds
        for _ in range(self._begun):
            if not self._under_way.acquire(timeout=max(0.0, deadline - time.monotonic())):
                return

    def _answer(self, request: dict) -> None:  # type: ignore[type-arg]
        try:
            self._settled.wait()
            if self._driver is None:
                status, value, name, text = UNKNOWN, 0, "CUDA_ERROR_UNKNOWN", "the driver did not start"
            else:
                status, value = self._driver.call(request)
                name, text = self._driver.words(status)
            self._say({"id": request["id"], "status": status, "name": name, "text": text, "value": value})
        finally:
            self._under_way.release()

    def _say(self, message: dict) -> None:  # type: ignore[type-arg]
        # If rekindle is gone, the main thread sees that, too.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._control.send(json.dumps(message).encode())


def receive(control: socket.socket) -> bytes:
    try:
        return control.recv(MESSAGE_BYTES)
    except ConnectionResetError:  # rekindle went before it had read all
        return b""


def look() -> int:
    """Prints why the driver cannot be used, as far as it shows without starting it."""
    try:
        LoadedDriver()
    except LackError as lack:
        print(lack, flush=True)
        return 1
    return 0


def main() -> int:
    control = socket.socket(fileno=int(sys.argv[1]))
    control.set_inheritable(False)
    parent = int(sys.argv[2])
    # Not PR_SET_PDEATHSIG: that comes when the thread ends which started us.
    gone = os.pidfd_open(parent)
    if os.getppid() != parent:
        return 1
    client = BackendClient(control)
    threading.Thread(target=client.start, daemon=True).start()
    poller = poll()
    poller.register(control, POLLIN)
    poller.register(gone, POLLIN)
    while True:
        ready = [fd for fd, _ in poller.poll()]
        if control.fileno() in ready and (message := receive(control)):
            client.take(message)
            continue
        client.finish(FAREWELL_SECONDS)
        return 0


if __name__ == "__main__":
    status = look() if sys.argv[1:] == ["--look"] else main()
    os._exit(status)  # a call that hangs would keep the interpreter
