# SPDX-License-Identifier: Apache-2.0
"""Save a server that was started otherwise, and that serves on: a process tree, by the PID of its root.

from snapshot import save_process

image = save_process(4711, options)

It is dumped where it is and restored into a cell. Its clients are not held back: they wait while it is
frozen. Their connections are closed in the image, not in the server.
"""

import contextlib
import os
import stat
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from msgspec import structs

from oci.image import Image
from rekindle.cell import descendants, processes
from rekindle.cell.foreign import NAMESPACES, ForeignCell
from rekindle.engine import Engine
from rekindle.engine.client import Client
from rekindle.errors import CapabilityError, NotDumpableError, UsageError
from rekindle.proc import at_random, start_ticks
from rekindle.report import Pause, Report
from snapshot import make
from snapshot.flow import snapshot
from snapshot.options import Progress, SnapshotOptions
from snapshot.outside_connections import CONNECTED_STATES, Outside
from snapshot.server import Server
from snapshot.warm import known_oracle

_LOWEST_PID = 300
"""A restore starts CRIU and its helpers with the first PIDs of a cell."""

_RUN_IT = (
    "start it by `rekindle run NAME -- COMMAND`, and save it by `rekindle snapshot IMAGE --replica NAME`"
)


def command_of(pid: int) -> tuple[str, ...]:
    """Return the command line of a process. Raises UsageError if there is none."""
    with contextlib.suppress(OSError):
        words = os.fsdecode(Path(f"/proc/{pid}/cmdline").read_bytes()).split("\0")[:-1]
        if words:
            return tuple(words)
    raise UsageError(f"there is no process {pid}", hint="the PID is that on this host, or in this container")


def save_process(
    pid: int,
    options: SnapshotOptions,
    report: Report | None = None,
    progress: Progress | None = None,
) -> Image:
    """Save the server whose root is a process of this host; its command is that of `options`.

    Whatever fails, the server serves on. Raises CapabilityError, with the reason, for one that cannot be
    saved in this way, before anything is done; NotDumpableError, and the errors of `snapshot`.
    """
    report = report or Report(verb="snapshot")
    require_savable(pid)
    proc = Path(f"/proc/{pid}")
    given = _environment(proc)
    report.pause = Pause()

    @contextlib.contextmanager
    def start(_: make.ServerSpec, engine: Engine, __: Path, report: Report) -> Iterator[make.WarmServer]:
        with ForeignCell(pid) as cell:
            server = _ForeignServer(cell, pid, given)
            _require_local(cell, pid)
            with report.phase("oracle"):
                oracle = known_oracle(server, engine, Client(engine.endpoint, cell.connect))
            yield make.WarmServer(
                cell=cell,
                server=server,
                oracle=oracle,
                reads=_Unknown(),
                began_ns=_began_ns(pid),
                start_seconds=0.0,
                stop_watching=lambda: None,
                runs_on=True,
            )

    with contextlib.chdir((proc / "cwd").readlink()):
        asked = structs.replace(options, outside=Outside.CLOSE)
        return snapshot(asked, report, progress, start=start, given=given)


def require_savable(pid: int) -> None:
    """Raise CapabilityError, with the way to start it, for a server that cannot be saved by its PID."""
    command_of(pid)
    if reason := _problem(pid):
        raise CapabilityError(f"process {pid} cannot be saved while it runs", cause=reason, hint=_RUN_IT)


def _problem(pid: int) -> str:
    tree = [pid, *descendants.of(pid)]
    if pid == 1:
        return "it is the init of this PID namespace, which CRIU restores only with the namespace"
    if os.getpid() in tree:
        return "this command is one of its descendants"
    for each in tree:
        for name in NAMESPACES:
            with contextlib.suppress(FileNotFoundError):
                theirs, ours = (Path(f"/proc/{who}/ns/{name}") for who in (each, "self"))
                try:
                    is_same = theirs.readlink() == ours.readlink()
                except PermissionError:
                    return f"process {each} may not be traced by this user"
                if not is_same:
                    return f"process {each} has another {name} namespace: run this command where it runs"
        status = _status(each)
        if status.get("TracerPid", "0") != "0":
            return f"process {each} is traced by process {status['TracerPid']}"
        if each < _LOWEST_PID:
            return f"PID {each} is one of the first of a PID namespace, which a restore needs itself"
    return ""


def _status(pid: int) -> dict[str, str]:
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return {}


def _environment(proc: Path) -> dict[str, str]:
    variables = os.fsdecode((proc / "environ").read_bytes()).split("\0")
    return {name: value for name, sign, value in (each.partition("=") for each in variables) if sign}


def _began_ns(pid: int) -> int:
    """Return when a process was started, rounded up: what was there before is not its own."""
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - (start_ticks(pid) + 1) / os.sysconf("SC_CLK_TCK")
    return time.time_ns() - int(age * 1e9)


def _require_local(cell: ForeignCell, pid: int) -> None:
    """Raise NotDumpableError if the server uses addresses of this host that a cell does not have."""
    inside = processes.socket_inodes(cell, processes.tree(cell, pid))
    listens = [
        f"it listens on {each.host}"
        for each in processes.listeners(cell)
        if each.inode in inside and not _is_local(each.host)
    ]
    talks = [f"its processes are connected with each other over {host}" for host in _inner_hosts(pid, inside)]
    if found := sorted({*listens, *talks}):
        raise NotDumpableError(
            "the server uses an address of this host that a restored one will not have",
            cause="\n".join(found),
            hint="start it on 127.0.0.1 or 0.0.0.0, and vLLM with VLLM_HOST_IP=127.0.0.1",
        )


def _inner_hosts(pid: int, inside: Collection[int]) -> Iterator[str]:
    """Yield the addresses, other than local ones, between which processes of the server are connected."""
    ends = {}
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] in CONNECTED_STATES and int(fields[9]) in inside:
                    ends[fields[1]] = fields[2]
    for here, there in ends.items():
        if ends.get(there) == here and not _is_local(host := processes.address(here)[0]):
            yield host


def _is_local(host: str) -> bool:
    host = host.removeprefix("::ffff:")
    return host in {"0.0.0.0", "::", "::1"} or host.startswith("127.")


class _ForeignServer(Server):
    """The server: its root gets its signals itself, and its output goes where it was sent."""

    def __init__(self, cell: ForeignCell, pid: int, environment: dict[str, str]) -> None:
        self.__dict__.update(
            Server.running(cell, pid, environment, _output(pid, 1), _output(pid, 2)).__dict__
        )
        self.file_key = at_random(Path(f"/proc/{pid}"))  # no shell of ours has a key

    @property
    def server_pid(self) -> int:
        return self.root_pid


def _output(pid: int, fd: int) -> Path:
    """Return the name of a descriptor for output as CRIU knows it, below the root: that of a pipe, too."""
    place = Path(f"/proc/{pid}/fd/{fd}")
    try:
        if stat.S_ISSOCK(place.stat().st_mode):
            raise NotDumpableError(
                f"descriptor {fd} of process {pid} is a socket, which a restored server would not have",
                hint="let the server write to a file",
            )
        return Path("/") / place.readlink()
    except OSError as error:
        raise UsageError(f"process {pid} has no descriptor {fd}", cause=str(error)) from error


class _Unknown:
    """The files that it has read since its start, which nobody has watched."""

    read: Collection[str] = ()

    def __init__(self) -> None:
        self.problem = "it was not started by rekindle"
        self.written: set[tuple[int, int]] = set()

    def lasting(self, pids: Collection[int]) -> Sequence[str]:  # noqa: ARG002
        return ()
