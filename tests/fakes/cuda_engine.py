# SPDX-License-Identifier: Apache-2.0
"""A CUDA driver that is not there, as far as checkpointing goes. Run as `cuda-checkpoint`, and by cuda.c.

As with the real one, cuInit starts a thread whose name tells the ends of two pipes: `begin_restore_thread`.
The driver finds a process by that thread and reaches it by those pipes, so both must outlive a dump.

A process also holds CUDA contexts if /dev/shm/fake-cuda-PID is there for it, PID being its own view of
itself; the file is its state, as JSON: `state`, `device_bytes`, `uuids`. So in a cell the state is in the
cell's private /dev/shm, and goes where that goes. Without it, the process has called cuInit only.

The file that FAKE_CUDA names is what this driver is like; all of it may be missing:

    driver          "580.65.06": what it can do follows from that
    init            the result of cuInit; `init_seconds` is how long it takes
    needs_init      calls before cuInit is over are answered with NOT_INITIALIZED
    gpus            the UUIDs on this node; without it, any
    seconds         {STEP: how long it takes}
    busy            [PID]: never come to rest, so a lock of them times out
    coordinators    [PID]: hold no CUDA, and have a state all the same
    free_bytes      memory on the GPUs: a restore of more fails, and cannot be repeated (cuda-checkpoint#44)
    last_user_of    PATH: a device. If no process has it open after a checkpoint, the GPU is shut down and the
                    process dies, as without persistence mode; if none has it open at a restore, that fails
    held_by_restored
                    PATH: a file that a restored process opens, and keeps open until its next checkpoint. If
                    it is one of tests.servers.silent_fuse, a process that is killed meanwhile does not end
                    (cuda-checkpoint#53)
    lock_of_idle    the result of a lock of a process without a context; 3 (NOT_INITIALIZED) by default
    faults          [{"step", "pid" or "nth" or neither, "code", "hang", "seconds", "state", "times"}]

Steps are init, state, restore-thread, lock, checkpoint, restore and unlock. The nth is that of the step,
since the log began. A fault's `state` is what the process is in afterwards. The log is the same file with
`.log`: a line of JSON for the beginning and for the end of every step.
"""

import fcntl
import json
import os
import re
import signal
import stat
import sys
import threading
import time
from contextlib import suppress
from typing import Any

CODES = {
    0: ("CUDA_SUCCESS", "no error"),
    1: ("CUDA_ERROR_INVALID_VALUE", "invalid argument"),
    2: ("CUDA_ERROR_OUT_OF_MEMORY", "out of memory"),
    3: ("CUDA_ERROR_NOT_INITIALIZED", "initialization error"),
    100: ("CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"),
    304: ("CUDA_ERROR_OPERATING_SYSTEM", "OS call failed or operation not supported on this OS"),
    401: ("CUDA_ERROR_ILLEGAL_STATE", "the operation cannot be performed in the present state"),
    600: ("CUDA_ERROR_NOT_READY", "device not ready"),
    800: ("CUDA_ERROR_NOT_PERMITTED", "operation not permitted"),
    801: ("CUDA_ERROR_NOT_SUPPORTED", "operation not supported"),
    999: ("CUDA_ERROR_UNKNOWN", "unknown error"),
}
INVALID_VALUE, OUT_OF_MEMORY, NOT_INITIALIZED, OPERATING_SYSTEM = 1, 2, 3, 304
ILLEGAL_STATE, NOT_READY, NOT_PERMITTED, UNKNOWN = 401, 600, 800, 999
STATES = ["running", "locked", "checkpointed", "failed"]
LAWFUL = {
    "lock": ("running", "locked"),
    "checkpoint": ("locked", "checkpointed"),
    "restore": ("checkpointed", "locked"),
    "unlock": ("locked", "running"),
}
CUDA_VERSIONS = {550: 12040, 555: 12050, 560: 12060, 565: 12070, 570: 12080, 575: 12090, 580: 13000}
HANG_SECONDS = 60.0
HELP = """\
CUDA checkpoint and restore utility.
Version {version}. Copyright (C) 2025 NVIDIA Corporation. All rights reserved.

Operations:
{operations}
Options:
--pid|-p <pid>
\tThe pid upon which to perform the operation
"""
# What the real tool prints, in the words of libcuda 555; its exit status is then 1, whatever the result.
NO_START = 'Error initializing CUDA: "%s"'
NO_STATE = 'Error getting process state for process ID %d: "%s"'
NO_THREAD = "Could not find restore thread for process ID %d"
NOT_DONE = 'Could not %s on process ID %d: "%s"'
UNKNOWN_OPTION = "Invalid option(s) or option(s) not supported by this CUDA Driver"
QUESTION, OPEN, CLOSE = b"?", b"o", b"c"  # to a restore thread
TEXTS = (NO_START, NO_STATE, NO_THREAD, NOT_DONE, UNKNOWN_OPTION)
_THREAD, _NAME_BITS = re.compile(r"cuda([0-9a-f]{11})"), 22
PARENT = os.getppid()

# As in the files, which tests write.
JSON = dict[str, Any]


def configuration() -> JSON:
    with suppress(KeyError, FileNotFoundError), open(os.environ["FAKE_CUDA"]) as file:
        return dict(json.load(file))
    return {}


class Log:
    """Locked while it is held, which also makes a step's transition one at a time."""

    def __enter__(self) -> "Log":
        self.file = open(os.environ["FAKE_CUDA"] + ".log", "a+")
        fcntl.flock(self.file, fcntl.LOCK_EX)
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def events(self) -> list[JSON]:
        self.file.seek(0)
        return [json.loads(line) for line in self.file]

    def add(self, **event: object) -> None:
        self.file.write(json.dumps({**event, "time": time.monotonic()}) + "\n")


def state_path(pid: int) -> str:
    """Where the state of a process is, seen from here. Raises OSError if there is no such process."""
    with open(f"/proc/{pid}/status") as file:
        fields = dict(line.rstrip("\n").split(":\t", 1) for line in file if ":\t" in line)
    return f"/proc/{pid}/root/dev/shm/fake-cuda-{fields['NStgid'].split()[-1]}"


def read_state(pid: int) -> JSON | None:
    """None if the process holds no CUDA."""
    with suppress(OSError), open(state_path(pid)) as file:
        return dict(json.load(file))
    return None


def write_state(pid: int, state: JSON) -> None:
    path = state_path(pid)
    staged = f"{path}.{os.getpid()}"
    with open(staged, "w") as file:
        json.dump(state, file)
    os.rename(staged, path)


def begin_restore_thread() -> int:
    """Start the thread that cuInit starts, in this process; return its ID.

    libcuda 555 names it after its pipes: `cuda` and eleven hexadecimal digits. The lowest 22 bits are the
    descriptor that answers are read from, and those above the one that requests are written to.
    """
    requests, to_thread = os.pipe()
    answers, from_thread = os.pipe()
    started = threading.Event()
    ids = []

    def serve() -> None:
        ids.append(threading.get_native_id())
        with open(f"/proc/self/task/{ids[0]}/comm", "w") as comm:
            comm.write(f"cuda{to_thread << _NAME_BITS | answers:011x}")
        started.set()
        held = -1
        while request := os.read(requests, 1):
            if request == OPEN and held < 0:
                held = os.open(configuration()["held_by_restored"], os.O_RDONLY | os.O_CLOEXEC)
            if request == CLOSE and held >= 0:
                os.close(held)
                held = -1
            os.write(from_thread, request)

    threading.Thread(target=serve, daemon=True).start()
    started.wait()
    return ids[0]


def find_restore_thread(pid: int, request: bytes = QUESTION) -> int:
    """The restore thread of a process, as it is called here; 0 if there is none. Its pipes must answer."""
    with suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with suppress(OSError), open(f"/proc/{pid}/task/{thread}/comm") as comm:
                if found := _THREAD.fullmatch(comm.read().strip()):
                    return int(thread) if answers(pid, *ends(found[0]), request) else 0
    return 0


def ends(name: str) -> tuple[int, int]:
    """The descriptors of a restore thread, by its name: to write requests to, and to read answers from."""
    value = int(name.removeprefix("cuda"), 16)
    return value >> _NAME_BITS, value & (1 << _NAME_BITS) - 1


def answers(pid: int, request_end: int, answer_end: int, request: bytes = QUESTION) -> bool:
    """Whether the restore thread of a process answers at its pipes."""
    with suppress(OSError):
        end = os.open(f"/proc/{pid}/fd/{request_end}", os.O_WRONLY | os.O_NONBLOCK)
        try:
            answer = os.open(f"/proc/{pid}/fd/{answer_end}", os.O_RDONLY)
            try:
                if not stat.S_ISFIFO(os.fstat(end).st_mode):
                    return False
                os.write(end, request)
                return os.read(answer, 1) == request
            finally:
                os.close(answer)
        finally:
            os.close(end)
    return False


def wait(seconds: float, *, even_alone: bool) -> bool:
    """False if our parent died meanwhile; what is in a process goes on only as long as that lives."""
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        time.sleep(min(left, 0.02))
        if os.getppid() != PARENT and not even_alone:
            return False
    return True


def fault_of(config: JSON, step: str, pid: int, events: list[JSON]) -> tuple[int | None, JSON]:
    """The fault that this call meets; `events` are all before it."""
    count = 1 + sum(event["step"] == step and event["event"] == "begin" for event in events)
    for number, fault in enumerate(config.get("faults", [])):
        met = sum(event.get("fault") == number for event in events)
        here = fault["step"] == step and fault.get("pid", pid) == pid and fault.get("nth", count) == count
        if here and met < fault.get("times", 1 << 30):
            return number, fault
    return None, {}


def perform(
    step: str, pid: int, backend: str, *, timeout_ms: int = 0, device_map: dict[str, str] | None = None
) -> tuple[int, int]:
    """One call: its result, and the value that it gives."""
    config = configuration()
    with Log() as log:
        number, fault = fault_of(config, step, pid, log.events())
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        log.add(event="begin", step=step, pid=pid, backend=backend, fault=number, visible=visible)
    alone = backend == "utility"
    if not wait(config.get("seconds", {}).get(step, 0) + fault.get("seconds", 0), even_alone=alone):
        sys.exit(1)
    if fault.get("hang"):
        wait(HANG_SECONDS, even_alone=False)
        sys.exit(1)
    busy = step == "lock" and pid in config.get("busy", [])
    if busy and not wait(timeout_ms / 1000 if timeout_ms else HANG_SECONDS, even_alone=alone):
        sys.exit(1)
    with Log() as log:
        if os.getppid() != PARENT and not alone:
            sys.exit(1)
        before = (read_state(pid) or {}).get("state")
        if "code" in fault:
            code, value = fault["code"], 0
        elif busy:
            code, value = NOT_READY, 0
        else:
            code, value = transition(config, step, pid, device_map or {})
        if "state" in fault and (held := read_state(pid)):
            write_state(pid, {**held, "state": fault["state"]})
        after = (read_state(pid) or {}).get("state")
        log.add(event="end", step=step, pid=pid, backend=backend, code=code, before=before, after=after)
    return code, value


def transition(config: JSON, step: str, pid: int, device_map: dict[str, str]) -> tuple[int, int]:
    held, thread = read_state(pid), find_restore_thread(pid)
    if not thread:
        if step == "state" and pid in config.get("coordinators", []):
            return 0, 0
        return INVALID_VALUE, 0
    if step == "restore-thread":
        return 0, thread
    if held is None:
        return (0, 0) if step == "state" else (config.get("lock_of_idle", NOT_INITIALIZED), 0)
    if step == "state":
        return 0, STATES.index(held["state"])
    lawful, target = LAWFUL[step]
    if held["state"] != lawful:
        return ILLEGAL_STATE, 0
    if step == "restore":
        there = config.get("gpus")
        if device_map:
            if set(device_map) != set(held["uuids"]):
                return INVALID_VALUE, 0
            new = [device_map[uuid] for uuid in held["uuids"]]
        elif there is None or set(held["uuids"]) <= set(there):
            new = held["uuids"]
        elif len(there) == len(held["uuids"]):
            new = there  # by position, as drivers do it on another node
        else:
            return INVALID_VALUE, 0
        if len(set(new)) != len(new) or not (there is None or set(new) <= set(there)):
            return INVALID_VALUE, 0
        held["uuids"] = new
    if held.get("broken"):
        return (OPERATING_SYSTEM if step == "restore" else ILLEGAL_STATE), 0
    if step == "restore" and held["device_bytes"] > config.get("free_bytes", held["device_bytes"]):
        write_state(pid, {**held, "broken": True})
        return OUT_OF_MEMORY, 0
    device = config.get("last_user_of")
    if step == "restore" and device and not is_open(device):
        return NOT_PERMITTED, 0
    if step == "checkpoint" and device and not is_open(device):
        write_state(pid, {**held, "state": "failed"})
        os.kill(pid, signal.SIGKILL)
        return NOT_PERMITTED, 0
    if config.get("held_by_restored") and step in {"restore", "checkpoint"}:
        find_restore_thread(pid, OPEN if step == "restore" else CLOSE)
    try:
        write_state(pid, {**held, "state": target})
    except OSError:  # it ended just now
        return INVALID_VALUE, 0
    return 0, 0


def is_open(path: str) -> bool:
    """Whether a process has a file open."""
    for process in filter(str.isdecimal, os.listdir("/proc")):
        with suppress(OSError):
            for descriptor in os.listdir(f"/proc/{process}/fd"):
                with suppress(OSError):
                    if os.readlink(f"/proc/{process}/fd/{descriptor}") == path:
                        return True
    return False


def initialise(backend: str) -> int:
    """cuInit: its result."""
    config = configuration()
    with Log() as log:
        number, fault = fault_of(config, "init", 0, log.events())
        log.add(event="begin", step="init", pid=0, backend=backend, fault=number)
    seconds = config.get("init_seconds", 0) + fault.get("seconds", 0)
    if not wait(HANG_SECONDS if fault.get("hang") else seconds, even_alone=False):
        sys.exit(1)
    return int(fault["code"] if "code" in fault else config.get("init", 0))


def major(config: JSON) -> int:
    return int(config.get("driver", "580.65.06").partition(".")[0])


def parse_map(text: str) -> dict[str, str]:
    return dict(pair.split("=", 1) for pair in text.split(",")) if text else {}


def as_driver(words: list[str]) -> int:
    """For cuda.c: prints the result and the value."""
    step, pid, argument, initialised = words[0], int(words[1]), words[2], words[3]
    if not initialised and step not in {"init", "version"} and configuration().get("needs_init"):
        print(NOT_INITIALIZED, 0)
        return 0
    if step == "version":
        known = [version for number, version in CUDA_VERSIONS.items() if number <= major(configuration())]
        print(0, known[-1])
        return 0
    if step == "init":
        print(initialise("driver"), 0)
        return 0
    device_map = parse_map(argument) if step == "restore" else {}
    if device_map and major(configuration()) < 580:
        print(INVALID_VALUE, 0)  # what was reserved must be zero
        return 0
    timeout_ms = int(argument) if step == "lock" else 0
    print(*perform(step, pid, "driver", timeout_ms=timeout_ms, device_map=device_map))
    return 0


def as_utility(words: list[str]) -> int:
    config = configuration()
    known = {"--pid", "--get-state", "--get-restore-tid", "--toggle", "--help"}
    operations = "--get-state --pid <pid>\n--toggle --pid <pid>\n--get-restore-tid --pid <pid>\n"
    if major(config) >= 555:
        known |= {"--action", "--timeout"}
        extra = " [--device-map <uuids>]" if major(config) >= 580 else ""
        operations += f"--action lock | checkpoint | restore | unlock --pid <pid> [--timeout <ms>]{extra}\n"
    if major(config) >= 580:
        known.add("--device-map")
    options, rest = {}, list(words)
    while rest:
        name = {"-p": "--pid", "-h": "--help", "-t": "--timeout", "-d": "--device-map"}.get(rest[0], rest[0])
        rest.pop(0)
        if name not in known:
            print(UNKNOWN_OPTION, file=sys.stderr)
            return 1
        takes = name in {"--pid", "--action", "--timeout", "--device-map"}
        options[name] = rest.pop(0) if takes else ""
    if "--help" in options:
        print(HELP.format(version=config.get("driver", "580.65.06"), operations=operations), end="")
        return 0
    if code := initialise("utility"):
        print(NO_START % CODES[code][1], file=sys.stderr)
        return 1
    pid = int(options["--pid"])
    if "--get-state" in options:
        step = "state"
    elif "--get-restore-tid" in options:
        step = "restore-thread"
    else:
        step = options["--action"]
    code, value = perform(
        step,
        pid,
        "utility",
        timeout_ms=int(options.get("--timeout", 0)),
        device_map=parse_map(options.get("--device-map", "")),
    )
    if code:
        failures = {"state": NO_STATE % (pid, CODES[code][1]), "restore-thread": NO_THREAD % pid}
        print(failures.get(step, NOT_DONE % (step, pid, CODES[code][1])), file=sys.stderr)
        return 1
    if step == "state":
        print(STATES[value])
    elif step == "restore-thread":
        print(value)
    return 0


def be_process() -> None:
    """For tests.fakes.cuda: a process with a restore thread, which does nothing."""
    begin_restore_thread()
    print("ready", flush=True)
    while True:
        signal.pause()


if __name__ == "__main__":
    if sys.argv[1:] == ["--process"]:
        be_process()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    as_what = as_driver if sys.argv[1:2] == ["--driver"] else as_utility
    sys.exit(as_what(sys.argv[2:] if as_what is as_driver else sys.argv[1:]))
