# SPDX-License-Identifier: Apache-2.0
"""Run a workload in a cell: in namespaces of its own, controlled from the host.

A cell has its own PIDs, mounts, System V IPC, clocks and, by default, network, and a private /dev/shm.
CRIU runs inside it too: it sees a plain process tree and dumps no namespace, so one dump can be restored
many times on one host. docs/adr/0001-cell.md explains each part.
"""

import contextlib
import errno
import json
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, NamedTuple, Self

from rekindle.cell import descendants, init
from rekindle.errors import CapabilityError, RekindleError, RestoreError
from rekindle.run import TimeoutExpired, spawn

MEMORY_PLACE = Path(init.MEMORY_PLACE)
"""The directory of the memory files as seen inside a cell."""

_START_SECONDS = 20.0
_LOOK_SECONDS = 1.0
_STUCK_SECONDS = 10.0


class Network(StrEnum):
    """The network of a cell: its own, with only a loopback interface, or the host's."""

    PRIVATE = "private"
    HOST = "host"


class Clocks(NamedTuple):
    """Readings of CLOCK_MONOTONIC and CLOCK_BOOTTIME, in nanoseconds."""

    monotonic_ns: int
    boottime_ns: int

    @classmethod
    def now(cls) -> Self:
        return cls(
            monotonic_ns=time.clock_gettime_ns(time.CLOCK_MONOTONIC),
            boottime_ns=time.clock_gettime_ns(time.CLOCK_BOOTTIME),
        )


class MappingRefused(Exception):  # noqa: N818 - it is an answer: copy instead
    """Memory files cannot be mapped in this cell; the text says why. The cell is unchanged."""


class MemoryFiles(NamedTuple):
    """Files that hold private anonymous memory, for processes that map them instead.

    `directory` is a path on the host; the cell shows it at MEMORY_PLACE, or instead `mount`, a descriptor of
    a mount that is attached nowhere. `ranges` are all address ranges, [start, end), at which any process maps
    one of the files, sorted and disjoint.
    """

    directory: Path
    ranges: Sequence[tuple[int, int]]
    mount: int | None = None


class Command(NamedTuple):
    """A command to start in a cell.

    `files` are opened inside the cell (0 for reading, others for appending). `fds` maps descriptor
    numbers of the command to descriptors of ours. Every other descriptor is closed. A `workload` is
    going to be snapshotted: it gets suitable PIDs, system call filter and memory layout.

    `criu_facts` is for CRIU: the content of `init.CRIU_FACTS`, shown there until CRIU has opened it, or b""
    for an empty directory.

    With `memory`, the command and everything that it starts, which includes what CRIU restores, may map
    memory files, and the cell makes them behave as anonymous memory. A cell runs one such command.

    With `clear_groups`, the command has no supplementary groups, as far as that is allowed.
    """

    argv: Sequence[str]
    env: Mapping[str, str]
    cwd: Path
    files: Mapping[int, Path] = MappingProxyType({})
    fds: Mapping[int, int] = MappingProxyType({})
    workload: bool = False
    memory: MemoryFiles | None = None
    criu_facts: bytes | None = None
    clear_groups: bool = False


class Cell:
    """A running cell. Leaving the context kills every process in it and drops its mounts.

    The cell also ends when the thread that created it dies, even by SIGKILL: create it in a thread that
    outlives it. `connect` and `socket` are thread-safe; the other methods are not.

    With `only`, the processes in it are those from this one down, and others are somebody else's.
    """

    only: int | None = None

    def __init__(self) -> None:
        """Start the launcher, which takes some 20 ms to boot; `enter` creates the namespaces."""
        self._reset()
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        program = [sys.executable, "-I", "-S", "-B", init.__file__]
        try:
            self._launcher = spawn(
                [*program, str(theirs.fileno()), str(os.getpid())],
                env={"PATH": os.defpath},
                pass_fds=[theirs.fileno()],
                stderr=2,
            )
        except BaseException:
            self._control.close()
            raise
        finally:
            theirs.close()

    def _reset(self) -> None:
        self._exits: dict[int, int] = {}
        self._spawned: list[int] = []
        self._problems: list[str] | None = None
        self._untraced: set[tuple[int, str]] = set()
        self._init = 0
        self._ready = False
        self._dial: socket.socket | None = None
        self._dialing = threading.Lock()
        self.clocks_offset = Clocks(monotonic_ns=0, boottime_ns=0)

    def enter(self, network: Network, clocks: Clocks | None = None) -> Self:
        """Create the namespaces; with `clocks`, the cell's clocks continue from there.

        Raises CapabilityError.
        """
        message = {
            "op": "enter",
            "monotonic": clocks and clocks.monotonic_ns,
            "boottime": clocks and clocks.boottime_ns,
        }
        if network is Network.PRIVATE:
            self._dial, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self._dial.settimeout(_START_SECONDS)
            with theirs:
                self._send(message, [theirs.fileno()])
        else:
            self._send(message)
        if clocks is not None:
            now = Clocks.now()
            self.clocks_offset = Clocks(
                monotonic_ns=clocks.monotonic_ns - now.monotonic_ns,
                boottime_ns=clocks.boottime_ns - now.boottime_ns,
            )
        deadline = time.monotonic() + _START_SECONDS
        while not (self._ready and self._init):  # reported by init and by launcher, in either order
            if not self._receive(deadline - time.monotonic()):
                raise CapabilityError(
                    f"the cell did not start within {_START_SECONDS:.0f} s",
                    hint="run `rekindle doctor` to see what is missing on this node",
                )
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end_after(error)

    def end_after(self, error: BaseException | None) -> None:
        """End the cell as `end` does, after an error, if there was one: that is what has to be told.

        So if processes are stuck, they are named in the error's cause.
        """
        try:
            self.end()
        except RestoreError as stuck:
            if not isinstance(error, RekindleError):
                raise
            error.cause = "; ".join(filter(None, [error.cause, f"{stuck.message}: {stuck.cause}"]))

    def end(self) -> None:
        """Kill every process of the cell and wait until the namespaces are gone. Idempotent.

        Raises RestoreError, which names them, if processes are stuck in the OS kernel, as on a dead network
        file system. Until it lets them go they keep their memory and the cell's mounts, which only they see.
        """
        self._control.close()  # init and launcher exit when it closes
        if self._dial is not None:
            self._dial.close()
        if self._init:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._init, signal.SIGKILL)
        else:
            self._launcher.kill()
        try:
            self._wait_for_launcher()
        finally:
            self._init = 0
            self._launcher.kill()
            with contextlib.suppress(TimeoutExpired):
                self._launcher.wait(_LOOK_SECONDS)

    def _wait_for_launcher(self) -> None:
        """Wait for the launcher, which waits for init, which waits for every process of the namespace.

        Be patient while something happens: freeing hundreds of gigabytes takes its time.
        """
        if self._launcher.returncode is not None:
            return
        pidfd = os.pidfd_open(self._launcher.pid)
        try:
            before, since = None, time.monotonic()
            while not select.select([pidfd], [], [], _LOOK_SECONDS)[0]:
                now = descendants.cpu_ticks(self._init)
                if now != before:
                    before, since = now, time.monotonic()
                elif time.monotonic() - since >= _STUCK_SECONDS:
                    raise RestoreError(
                        "the cell does not end: a process is stuck in the OS kernel",
                        cause="; ".join(descendants.stuck(self._init)) or "which one is unknown",
                        hint="it waits for a file system or a driver, and until that answers it keeps its "
                        "memory, on GPUs too, and the cell's mounts; a driver may need a reboot of the node",
                    )
            self._launcher.wait()
        finally:
            os.close(pidfd)

    @property
    def root(self) -> Path:
        """The root of the cell's file system as seen from the host, with the cell's private mounts."""
        return Path(f"/proc/{self._init}/root")

    @property
    def init_pid(self) -> int:
        """The PID on the host of the cell's PID 1."""
        return self._init

    @property
    def launcher_pid(self) -> int:
        """The PID of the launcher, our child; the cell ends when it does."""
        return self._launcher.pid

    @property
    def has_own_network(self) -> bool:
        return self._dial is not None

    def descriptors(self) -> list[int]:
        """Return the descriptors of its sockets, for `rekindle.cell.borrowed`."""
        return [self._control.fileno(), *([self._dial.fileno()] if self._dial is not None else [])]

    def settle(self) -> list[int]:
        """Return the PIDs of what a borrower has started who did not live to hear of it."""
        self.adjust([])  # init answers in order
        self._spawned, started = [], self._spawned
        return started

    def note_exits(self, exits: Mapping[int, int]) -> None:
        """Note wait statuses that somebody else was told, by PID in the cell."""
        self._exits.update(exits)

    def clocks(self) -> Clocks:
        """Read the clocks as seen inside the cell."""
        now = Clocks.now()
        return Clocks(
            monotonic_ns=now.monotonic_ns + self.clocks_offset.monotonic_ns,
            boottime_ns=now.boottime_ns + self.clocks_offset.boottime_ns,
        )

    def spawn(self, command: Command) -> int:
        """Start a command and return its PID in the cell.

        A program that does not exist exits with status 127. Raises CapabilityError, or MappingRefused for a
        command with memory files, which was not started then.
        """
        request = {
            "op": "spawn",
            "argv": list(command.argv),
            "env": dict(command.env),
            "cwd": str(command.cwd),
            "files": {number: str(path) for number, path in command.files.items()},
            "fds": list(command.fds),
            "workload": command.workload,
            "clear_groups": command.clear_groups,
            "facts": None if command.criu_facts is None else command.criu_facts.hex(),
            "memory": command.memory
            and {
                "directory": str(command.memory.directory),
                "ranges": list(command.memory.ranges),
                "mounted": command.memory.mount is not None,
            },
        }
        mounts = [] if command.memory is None or command.memory.mount is None else [command.memory.mount]
        self._send_file("spawn", request, [*mounts, *command.fds.values()])
        deadline = time.monotonic() + _START_SECONDS
        while not self._spawned:
            if not self._receive(deadline - time.monotonic()):
                raise CapabilityError(
                    f"the cell did not start {command.argv[0]} within {_START_SECONDS:.0f} s"
                )
        return self._spawned.pop(0)

    def wait(self, pid: int, timeout: float) -> int | None:
        """Wait for a process to end and return its wait status, or None after `timeout` seconds.

        Works for processes started with `spawn` and for the root of a restored tree.
        """
        deadline = time.monotonic() + timeout
        while pid not in self._exits:
            if not self._receive(max(0.0, deadline - time.monotonic())):
                return None
        return self._exits[pid]

    def run(self, command: Command, timeout: float) -> int | None:
        """Run a command and return its exit status as a shell reports it.

        Kills the command after `timeout` seconds and returns None.
        """
        pid = self.spawn(command)
        status = self.wait(pid, timeout)
        if status is None:
            self.signal(pid, signal.SIGKILL)
            return None
        return exit_status(status)

    def signal(self, pid: int, signum: int, *, thread: int | None = None) -> None:
        """Send a signal to a process, given its PID in the cell, or to one of its threads alone.

        Does nothing if it is gone.
        """
        self._send({"op": "signal", "pid": pid, "signal": signum, "thread": thread})

    def adjust(self, settings: Sequence[Mapping[str, Any]]) -> list[str]:
        """Give restored processes what they would have by a start here, and what they had set themselves.

        `settings` are those of `rekindle.cell.settings.to_apply`. Returns what could not be set.
        """
        return self._carry_out("adjust", settings)

    def bind(self, pairs: Sequence[tuple[str, str]]) -> list[str]:
        """Show the first path of each pair at the second, in the cell. Return what could not be shown."""
        return self._carry_out("bind", pairs)

    def _carry_out(self, op: str, request: object) -> list[str]:
        self._problems = None
        self._send_file(op, request)
        deadline = time.monotonic() + _START_SECONDS
        while self._problems is None:
            if not self._receive(deadline - time.monotonic()):
                raise RestoreError(f"the cell did not {op} within {_START_SECONDS:.0f} s")
        return self._problems

    def relay(self, pid: int, signum: int) -> None:
        """Pass on a signal that we got, unless its sender has signalled everything in our control group."""
        self._send({"op": "relay", "pid": pid, "signal": signum})

    def untraced(self) -> set[tuple[int, str]]:
        """Return what processes have done without a trace, as (PID in the cell, kind of untraced.py)."""
        while self._receive(0.0):
            pass
        return self._untraced

    def fileno(self) -> int:
        """Return a descriptor that is readable after an event; then call `wait` with a timeout of 0."""
        return self._control.fileno()

    def connect(self, host: str, port: int, timeout: float) -> socket.socket:
        """Connect to a TCP address inside the cell. Raises OSError as socket.connect does."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        sock = self.socket(family)
        try:
            sock.settimeout(timeout)
            sock.connect((host, port))
        except BaseException:
            sock.close()
            raise
        return sock

    def socket(self, family: socket.AddressFamily) -> socket.socket:
        """Create a stream socket in the cell's network. Raises OSError.

        The cell's init creates it. No thread of ours enters that network, since it might not return: our own
        can be out of reach, in a user namespace, and a deadline may raise at any time.
        """
        if self._dial is None:
            return socket.socket(family, socket.SOCK_STREAM)
        with self._dialing:
            self._dial.send(bytes([family]))
            while True:
                answer, fds, _, _ = socket.recv_fds(self._dial, 2, 1, socket.MSG_CMSG_CLOEXEC)
                for fd in fds:
                    if answer[0] == family:
                        return socket.socket(family, socket.SOCK_STREAM, 0, fileno=fd)
                    os.close(fd)  # of a call that a deadline has interrupted
                if not fds:
                    number = answer[0] if answer else errno.ENETDOWN
                    raise OSError(number, f"the cell's network: {os.strerror(number)}")

    def _send_file(self, op: str, request: object, fds: Sequence[int] = ()) -> None:
        """Send a request in a file: a message holds at most some 200 kB, and environments can be larger."""
        with open(os.memfd_create("request"), "w+b", buffering=0) as file:
            file.write(json.dumps(request).encode())
            self._send({"op": op}, [file.fileno(), *fds])

    def _send(self, message: Mapping[str, Any], fds: Sequence[int] = ()) -> None:
        try:
            self._control.settimeout(_START_SECONDS)
            socket.send_fds(self._control, [json.dumps(message).encode()], list(fds))
        except (BrokenPipeError, ConnectionResetError):
            self._receive(0.0)
            raise self._ended() from None

    def _ended(self) -> RestoreError:
        """Return the error for a cell that ended although we did not end it."""
        try:
            cause = f"its launcher exited with status {self._launcher.wait(_START_SECONDS)}"
        except TimeoutExpired:
            cause = "its init closed the connection"
        return RestoreError(
            "the cell ended unexpectedly",
            cause=cause,
            hint="see `dmesg`: the OS kernel kills processes when memory runs out",
        )

    def _receive(self, timeout: float) -> bool:
        """Receive and apply one message; return False if none arrived in time."""
        self._control.settimeout(max(timeout, 0.0))
        try:
            content = self._control.recv(init.MESSAGE_BYTES)
        except (TimeoutError, BlockingIOError):
            return False
        except ConnectionResetError:
            content = b""
        if not content:
            raise self._ended()
        match json.loads(content):
            case {"exited": int(pid), "status": int(status)}:
                self._exits[pid] = status
            case {"spawned": int(pid)}:
                self._exits.pop(pid, None)
                self._spawned.append(pid)
            case {"untraced": str(kind), "pid": int(pid)}:
                self._untraced.add((pid, kind))
            case {"problems": list(problems)}:
                self._problems = problems
            case {"init": int(pid)}:
                self._init = pid
            case {"ready": True}:
                self._ready = True
            case {"refused": str(cause)}:
                raise MappingRefused(cause)
            case {"error": str(cause)}:
                raise CapabilityError(
                    "cannot create a cell on this node",
                    cause=cause,
                    hint="run as root (CAP_SYS_ADMIN) on Linux 5.6 or newer; see `rekindle doctor`",
                )
        return True


def exit_status(wait_status: int) -> int:
    """Convert a wait status to a shell's exit status: 128 + the signal's number if it was killed."""
    code = os.waitstatus_to_exitcode(wait_status)
    return code if code >= 0 else 128 - code
