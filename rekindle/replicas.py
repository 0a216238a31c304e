# SPDX-License-Identifier: Apache-2.0
"""The replicas of this home: the servers that rekindle runs, for commands that list, stop or enter them.

    $REKINDLE_HOME/replicas/NAME/
        status.json     what it is: the document of ReplicaStatus
        log             the output of a detached one
        lock            locked by the rekindle that serves it, as long as that lives

The OS kernel releases the lock however that process ends, also at a crash or a reboot. So a replica whose
lock is free has ended, whatever its status says. A process is not known by its PID alone, which can be
another's by now, but also by its start time, the boot and the PID namespace, and is signalled by a pidfd.

The newest twenty that have ended are kept, so that their logs can be read.
"""

import contextlib
import os
import re
import select
import time
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec
from msgspec import Struct

from rekindle import documents
from rekindle.errors import (
    CapabilityError,
    FormatError,
    Interrupted,
    NotFoundError,
    RekindleError,
    UsageError,
)
from rekindle.files import locked, remove_tree, try_lock
from rekindle.home import Home
from rekindle.proc import boot_id, start_ticks
from rekindle.report import Rung

SCHEMA = "rekindle.replica/1"
KILLED_STATUS = 137
"""The exit status of a replica that ended without a word, as after SIGKILL."""

_ENDED_KEPT = 20
_LOCK_SECONDS = 5.0
_POLL_SECONDS = 1.0
_PAUSE_SECONDS = 0.05
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")


class ReplicaState(StrEnum):
    """The state of a replica.

    `hibernated`: its server has ended, and its state is in an image. `killed`: the rekindle that served it is
    gone and has left no exit status.
    """

    STARTING = "starting"
    READY = "ready"
    STOPPING = "stopping"
    HIBERNATED = "hibernated"
    ENDED = "ended"
    KILLED = "killed"


class ProcessIdentity(Struct, frozen=True, kw_only=True):
    """A process, told apart from any later one with its PID. `started_ticks` counts from the boot."""

    pid: int
    started_ticks: int
    boot: str
    namespace: str

    @classmethod
    def of(cls, pid: int) -> Self:
        """Identify a running process. Raises OSError if there is none."""
        return cls(pid=pid, started_ticks=start_ticks(pid), boot=boot_id(), namespace=_pid_namespace())

    def open(self) -> int | None:
        """Return a pidfd of the process; None if it has ended.

        Raises CapabilityError in another PID namespace, where its PID means another process.
        """
        if self.boot != boot_id():
            return None
        if self.namespace != _pid_namespace():
            raise CapabilityError(
                f"process {self.pid} runs in another PID namespace",
                hint="run the command in the container that started the replica",
            )
        try:
            fd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return None
        with contextlib.suppress(OSError):
            if start_ticks(self.pid) == self.started_ticks:  # it is the one, and `fd` stays so
                return fd
        os.close(fd)
        return None


class ReplicaStatus(Struct, frozen=True, kw_only=True):
    """A replica as its rekindle describes it.

    `created` is in seconds since 1970. `serving` is the rekindle that serves it, `cell` the init of its cell,
    None on lower rungs. `exit_status` is None until it has ended. `endpoint` is "" if it is unknown.
    `options` are words of the command line of `restore` with which it is restored once it has hibernated as
    the image `hibernated`, and `command` is the one to start if that fails. `guarded` tells whether clients
    needed an API key; no key is kept.
    """

    name: str
    image: str
    created: float
    serving: ProcessIdentity
    digest: str = ""
    rung: Rung | None = None
    endpoint: str = ""
    state: ReplicaState = ReplicaState.STARTING
    detached: bool = False
    cell: ProcessIdentity | None = None
    exit_status: int | None = None
    options: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    hibernated: str = ""
    guarded: bool = False


class ReplicaEntry(Struct, frozen=True, kw_only=True):
    """A replica of this home, as it was a moment ago."""

    directory: Path
    status: ReplicaStatus
    state: ReplicaState

    @property
    def name(self) -> str:
        return self.status.name

    @property
    def runs(self) -> bool:
        return self.state in {ReplicaState.STARTING, ReplicaState.READY, ReplicaState.STOPPING}

    @property
    def can_wake(self) -> bool:
        return self.state is ReplicaState.HIBERNATED

    @property
    def log(self) -> Path:
        return self.directory / "log"

    @property
    def exit_status(self) -> int:
        """The exit status of one that has ended."""
        return KILLED_STATUS if self.status.exit_status is None else self.status.exit_status


class Registration:
    """The entry of a replica that this process serves, in a context. Updates never raise OSError: the server
    matters more than its entry.

    When the context is left, it has ended: with the status given to `end`, or that of the exception.
    """

    def __init__(self, directory: Path, lock: int, status: ReplicaStatus) -> None:
        self.directory, self._lock, self.status = directory, lock, status
        self._was_ready = False

    @property
    def name(self) -> str:
        return self.status.name

    @property
    def log(self) -> Path:
        return self.directory / "log"

    def fileno(self) -> int:
        return self._lock

    def take_over(self) -> None:
        """Become the serving process, as a child of the one that registered it."""
        self.update(serving=ProcessIdentity.of(os.getpid()))

    def ready(
        self,
        *,
        rung: Rung | None,
        digest: str,
        endpoint: str,
        cell_init: int | None,
        keys: Sequence[str] = (),
    ) -> None:
        """Note that the server is ready, the PID of its cell's init, and whether it needs an API key.

        A command that holds one of the keys is forgotten: the recorded one takes its place.
        """
        cell = None
        if cell_init:
            with contextlib.suppress(OSError):
                cell = ProcessIdentity.of(cell_init)
        self._was_ready = True
        holds_key = any(key in word for key in keys for word in self.status.command)
        self.update(
            state=ReplicaState.READY,
            rung=rung,
            digest=digest,
            endpoint=endpoint,
            cell=cell,
            guarded=bool(keys),
            command=() if holds_key else self.status.command,
        )

    def stopping(self) -> None:
        """Note that the server was asked to end."""
        self.update(state=ReplicaState.STOPPING)

    def end(self, exit_status: int) -> None:
        """Note that the server has ended."""
        self.update(state=ReplicaState.ENDED, exit_status=exit_status)

    def update(self, **changes: object) -> None:
        self.status = msgspec.structs.replace(self.status, **changes)
        with contextlib.suppress(OSError):
            _write(self.directory, self.status)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.end(_status_of(error))
        if self.status.hibernated and not self._was_ready:  # it can be tried again
            self.update(state=ReplicaState.HIBERNATED)
        if not self._was_ready and not self.status.detached:  # its caller has been told why
            with contextlib.suppress(OSError):
                remove_tree(self.directory)
        os.close(self._lock)


def register(
    home: Home,
    name: str | None,
    image: str,
    *,
    detached: bool = False,
    options: Sequence[str] = (),
    command: Sequence[str] = (),
    wakes: bool = False,
) -> Registration:
    """Add a replica that this process is going to serve.

    Without a name, it gets the first free one after the image: `tiny-1`. With `wakes`, it takes the place of
    a hibernated one. Raises UsageError if the name is invalid or another replica has it, OSError.
    """
    if name is not None and not _NAME.fullmatch(name):
        raise UsageError(
            f"invalid name '{name}'",
            hint="at most 63 letters, digits, '.', '_', '-'; the first is none of these",
        )
    with locked(home.root / "lock"):
        directory = home.replicas / name if name is not None else _free(home, image)
        if directory.exists():
            found = _look(directory)
            if found is not None and (found.runs or (found.can_wake and not wakes)):
                raise UsageError(
                    f"there is a replica '{name}' already",
                    hint=f"choose another name, or end it: rekindle stop {name}",
                )
            remove_tree(directory)
        directory.mkdir(mode=0o700)
        lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try_lock(lock, timeout=_LOCK_SECONDS)  # a look at it locks it for a moment
        status = ReplicaStatus(
            name=directory.name,
            image=image,
            created=time.time(),
            serving=ProcessIdentity.of(os.getpid()),
            detached=detached,
            options=tuple(options),
            command=tuple(command),
            hibernated=image if wakes else "",
        )
        _write(directory, status)
    return Registration(directory, lock, status)


def found(home: Home) -> list[ReplicaEntry]:
    """List the replicas of this home, also those that have ended, by their age, the oldest first."""
    replicas = [_look(directory) for directory in home.replicas.iterdir()]
    return sorted((each for each in replicas if each is not None), key=lambda each: each.status.created)


def find(home: Home, name: str) -> ReplicaEntry:
    """Return a replica by its name. Raises NotFoundError."""
    replica = _look(home.replicas / name) if _NAME.fullmatch(name) else None
    if replica is None:
        known = ", ".join(each.name for each in found(home) if each.runs) or "none"
        raise NotFoundError(
            f"no replica '{name}'", cause=f"those that run: {known}", hint="rekindle ps --all"
        )
    return replica


def running(home: Home, name: str) -> ReplicaEntry:
    """Return a replica that runs. Raises NotFoundError if it has ended."""
    replica = find(home, name)
    if not replica.runs:
        raise NotFoundError(
            f"the replica '{name}' has ended", cause=f"its exit status is {replica.exit_status}"
        )
    return replica


def look_again(replica: ReplicaEntry) -> ReplicaEntry:
    """Return a replica as it is now; if its entry was removed, as one that was killed."""
    now = _look(replica.directory)
    if now is None or now.status.created != replica.status.created:  # another one has its name by now
        return msgspec.structs.replace(replica, state=ReplicaState.KILLED)
    return now


def wait(replica: ReplicaEntry, timeout: float | None = None) -> bool:
    """Wait until a replica has ended; return False if it has not after `timeout` seconds."""
    deadline = None if timeout is None else time.monotonic() + timeout
    while (now := look_again(replica)).runs:
        left = _POLL_SECONDS if deadline is None else min(_POLL_SECONDS, deadline - time.monotonic())
        if left <= 0:
            return False
        _wait_for(now.status.serving, left)
    return True


def hibernate(home: Home, name: str, image: str) -> None:
    """Note that a replica, whose server has ended, is in an image."""
    with locked(home.root / "lock"):
        entry = find(home, name)
        _write(
            entry.directory,
            msgspec.structs.replace(entry.status, state=ReplicaState.HIBERNATED, hibernated=image),
        )


def forget(home: Home, name: str) -> None:
    """Let a hibernated replica end."""
    with locked(home.root / "lock"):
        entry = find(home, name)
        if entry.can_wake:
            _write(entry.directory, msgspec.structs.replace(entry.status, state=ReplicaState.ENDED))


def sweep(home: Home) -> None:
    """Remove all but the newest replicas that have ended."""
    with locked(home.root / "lock"):
        ended = [each for each in found(home) if not each.runs and not each.can_wake]
        for each in ended[:-_ENDED_KEPT]:
            remove_tree(each.directory)


def _free(home: Home, image: str) -> Path:
    """Return the directory of the first free name for a replica of an image."""
    last = image.partition("@")[0].removeprefix("oci:").rstrip("/").rpartition("/")[2]
    base = re.sub(r"[^A-Za-z0-9_.-]+", "-", last.partition(":")[0]).strip("-._")[:48] or "replica"
    number = 1
    while (home.replicas / f"{base}-{number}").exists():
        number += 1
    return home.replicas / f"{base}-{number}"


def _look(directory: Path) -> ReplicaEntry | None:
    """Read a replica's entry; None if it is being made, or none."""
    try:
        fd = os.open(directory / "lock", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    with open(fd, "rb"):
        has_ended = try_lock(fd, shared=True)
        # Read after the look at the lock: who ends writes its status first.
        try:
            status = documents.read(
                msgspec.json.decode((directory / "status.json").read_bytes()), _Document, "status.json"
            ).replica
        except (OSError, FormatError, msgspec.DecodeError):  # torn by a power failure
            return None
    state = status.state
    if has_ended and state not in {ReplicaState.ENDED, ReplicaState.HIBERNATED}:
        is_waking = state is ReplicaState.STARTING and status.hibernated
        state = ReplicaState.HIBERNATED if is_waking else ReplicaState.KILLED
    return ReplicaEntry(directory=directory, status=status, state=state)


class _Document(Struct, frozen=True, kw_only=True):
    schema: str
    replica: ReplicaStatus


def _write(directory: Path, status: ReplicaStatus) -> None:
    """Replace the document; not durably, since a reboot ends the replica."""
    staged = directory / ".status.json"
    staged.write_bytes(msgspec.json.encode(_Document(schema=SCHEMA, replica=status)))
    staged.replace(directory / "status.json")


def _status_of(error: BaseException) -> int:
    match error:
        case RekindleError():
            return error.exit_status
        case Interrupted():
            return 128 + error.signum
    return 1


def _wait_for(process: ProcessIdentity, timeout: float) -> None:
    """Wait until a process ends, at most `timeout` seconds."""
    fd = None
    with contextlib.suppress(CapabilityError):
        fd = process.open()
    if fd is None:  # its lock will be free in a moment, or it is in another container
        time.sleep(min(timeout, _PAUSE_SECONDS))
        return
    with open(fd, "rb"):
        poller = select.poll()
        poller.register(fd, select.POLLIN)
        poller.poll(timeout * 1000)


def _pid_namespace() -> str:
    return str(Path("/proc/self/ns/pid").readlink())
