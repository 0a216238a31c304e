# SPDX-License-Identifier: Apache-2.0
"""Run a server in a cell from its start, so that it can be saved while it runs.

$REKINDLE_HOME/replicas/NAME/
    log                         what it writes to its standard output and error
    stdout.log, stderr.log      other names of `log`: a dump must tell its descriptors apart
"""

import contextlib
import functools
import os
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from msgspec import Struct

from rekindle import documents
from rekindle.cell import Cell, Network, processes
from rekindle.cell.hook import Reseed
from rekindle.engine import Endpoint, Engine
from rekindle.engine.choose import for_command
from rekindle.engine.client import Client
from rekindle.errors import UsageError
from rekindle.fields import JSON
from rekindle.replicas import Registration
from rekindle.report import Outcome, Report, ServerAddress
from restore.client_address import ClientAddress
from restore.decide.publications import further, left_out, publications
from restore.listener import Listener, announced
from restore.serve import notify
from restore.serve.address import Addresses
from restore.serve.announce import say_addresses
from restore.serve.control import Control
from restore.serve.foreground import RestoredServer, ServerPids, Serving
from restore.signals import ENDING, Signals
from snapshot.describe import listened_endpoints
from snapshot.opened import OpenedFiles
from snapshot.options import READY_SECONDS
from snapshot.server import Server, make_temporary
from snapshot.warm import wait_ready

_COPY_SECONDS = 0.1


class RunOptions(Struct, frozen=True, kw_only=True):
    """The options of `rekindle run`: as those of a snapshot and of a restore with the same names."""

    command: tuple[str, ...]
    network: Network = Network.PRIVATE
    publish: tuple[str, ...] = ()
    client_address: ClientAddress | None = None
    ready_seconds: float = READY_SECONDS
    ready_url: str | None = None
    ready_file: Path | None = None
    oracle_file: Path | None = None
    reseed: Reseed = Reseed.UNSEEDED
    private_variables: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if not self.command:
            raise UsageError("no command", hint="rekindle run NAME -- vllm serve MODEL")
        if self.publish and self.network is Network.HOST:
            raise UsageError("--publish cannot be combined with --network host")


class BegunServer(Struct, frozen=True, kw_only=True):
    """A server that runs in a cell, and what a snapshot of it needs to know of its start.

    `environment` is that of rekindle, `given` that of the server. `read` and `written` are the files that it
    has opened and the devices and inodes of those that it has written; `problem` says why that is unknown.
    `lasting` are those that processes have opened which still run, in order. `reseed` is what its hooks
    reseed, which older versions have not loaded.
    """

    argv: tuple[str, ...]
    environment: Mapping[str, str]
    given: Mapping[str, str]
    directory: str
    network: Network
    ready_url: str | None
    oracle_file: str | None
    root_pid: int
    stdout: str
    stderr: str
    began_ns: int
    start_seconds: float
    read: list[str]
    written: list[tuple[int, int]]
    problem: str
    lasting: list[str] = []
    reseed: Reseed = Reseed.NONE


def run(options: RunOptions, registration: Registration, listener: Listener | None = None) -> int:
    """Run a server in a cell, serve until it exits, and return its status. Needs root.

    Call this in the main thread: signals are passed on to the server. Raises UsageError, CapabilityError,
    PortError, WorkloadError and NotReadyError, and Interrupted for a signal before it is ready.
    """
    listener = listener or Listener()
    report = Report(verb="run", tell=listener.say)
    report.replica = registration.name
    with Signals() as signals, contextlib.ExitStack() as stack:
        stack.enter_context(notify.ready_file(options.ready_file))
        try:
            serving, cell = _bring_up(options, registration, report, signals, stack)
        except BaseException as error:
            report.fail(error)
            listener.failed(report)
            raise
        report.outcome, report.pid = Outcome.STARTED, os.getpid()
        registration.ready(rung=None, digest="", endpoint=report.endpoint or "", cell_init=cell.init_pid)
        report.say(f"ready on {report.endpoint or 'its address'}")
        say_addresses(report)
        listener.ready(report)
        notify.ready(options.ready_file)
        with announced(listener, report):
            status = serving.run()
        assert status is not None
        return status


def _bring_up(
    options: RunOptions,
    registration: Registration,
    report: Report,
    signals: Signals,
    stack: contextlib.ExitStack,
) -> tuple[Serving, Cell]:
    """Start the server in a cell, wait until it is ready, and publish its port."""
    engine = for_command(options.command, ready_url=options.ready_url, oracle_file=options.oracle_file)
    ours = {name: value for name, value in os.environ.items() if name not in options.private_variables}
    environment = {**engine.environment(), **ours}
    with signals.raising():
        found = publications(options.publish, engine.endpoint, None)
        addresses = stack.enter_context(Addresses(found))
        if options.network is Network.HOST:
            addresses.release()
        cell = stack.enter_context(Cell())
        with report.phase("cell"):
            cell.enter(options.network)
        reads = stack.enter_context(OpenedFiles(cell))
        began_ns = time.time_ns()
        server = _start(cell, engine, options, environment, registration.directory)
        began = time.monotonic()
        with report.phase("ready"):
            client = Client(engine.endpoint, cell.connect)
            wait_ready(server, engine, client, options.ready_seconds, say=report.say)
    facts = functools.partial(_facts, options, server, environment, reads, began_ns, time.monotonic() - began)
    pids = ServerPids(root_pid=server.root_pid, server_pid=server.server_pid)
    output = [
        os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC) for path in (server.stdout, server.stderr)
    ]
    for fd in output:
        stack.callback(os.close, fd)
    replica = RestoredServer(cell, pids, None, output, facts)

    def asked_to_end(signum: int) -> None:
        if signum in ENDING:
            registration.stopping()
            notify.stopping(options.ready_file)

    serving = stack.enter_context(Serving(replica, signals, asked_to_end))
    serving.client_address = options.client_address
    stack.enter_context(Control(registration.directory, serving, replica))
    listeners = listened_endpoints(cell, processes.tree(cell, server.root_pid))
    if options.network is Network.PRIVATE:
        if not options.publish and not engine.serves_one_port:
            addresses.add(further(listeners, engine.endpoint))
        for sock, target in addresses.listen(engine.endpoint):
            serving.publish(sock, target)
    report.endpoint = str(addresses.main) if addresses.main else None
    report.addresses = _addresses(options, engine, addresses, listeners)
    return serving, cell


def _addresses(
    options: RunOptions, engine: Engine, addresses: Addresses, listeners: Sequence[Endpoint]
) -> list[ServerAddress]:
    """Return where the server listens and where clients reach it."""
    if options.network is Network.HOST:
        return [ServerAddress(server=str(each), published=str(each)) for each in listeners]
    made = [each.publication for each in addresses.all]
    left = [] if engine.serves_one_port else left_out(made, listeners, engine.endpoint)
    return addresses.published(engine.endpoint) + [ServerAddress(server=str(each)) for each in left]


def _start(
    cell: Cell, engine: Engine, options: RunOptions, environment: Mapping[str, str], directory: Path
) -> Server:
    log = directory / "log"
    log.touch(mode=0o600)
    for name in ("stdout.log", "stderr.log"):
        with contextlib.suppress(FileExistsError):
            (directory / name).hardlink_to(log)
    make_temporary(cell)
    engine.enter(cell.root)
    argv, launched = engine.launch(options.command, environment)
    return Server(cell, argv, launched, Path.cwd(), directory, options.reseed)


def _facts(
    options: RunOptions,
    server: Server,
    environment: Mapping[str, str],
    reads: OpenedFiles,
    began_ns: int,
    start_seconds: float,
) -> Mapping[str, JSON]:
    """Return what a snapshot needs to know."""
    begun = BegunServer(
        argv=options.command,
        environment=environment,
        given=server.environment,
        directory=str(Path.cwd()),
        network=options.network,
        ready_url=options.ready_url,
        oracle_file=str(options.oracle_file.absolute()) if options.oracle_file else None,
        root_pid=server.root_pid,
        stdout=str(server.stdout),
        stderr=str(server.stderr),
        began_ns=began_ns,
        start_seconds=start_seconds,
        read=list(reads.read),
        written=list(reads.written),
        problem=reads.problem,
        reseed=options.reseed,
        lasting=reads.lasting(processes.host_pids(server.cell)),
    )
    return {"run": documents.to_json(begun)}


class Follower:
    """Copies what is written to a file to a descriptor, in a thread, as a context."""

    def __init__(self, path: Path, target: int) -> None:
        self._path, self._target = path, target
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._copy, daemon=True)

    def __enter__(self) -> "Follower":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _copy(self) -> None:
        with open(self._path, "rb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                is_over = self._over.wait(_COPY_SECONDS)
                while content := file.read(1 << 16):
                    os.write(self._target, content)
                if is_over:
                    return
