# SPDX-License-Identifier: Apache-2.0
"""Make a dump and its record from a command: start the server, warm it, checkpoint it, describe it."""

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import Struct

from rekindle import __version__, criu
from rekindle.cell import MEMORY_PLACE, Cell, Clocks, Network, processes
from rekindle.cell.hook import Reseed
from rekindle.cell.read_settings import read_settings
from rekindle.criu import Criu, connections
from rekindle.criu.frozen import FrozenDump
from rekindle.dump_tree import TOPS, stored_memory
from rekindle.engine import Engine, Request, find_caches
from rekindle.engine.client import Client
from rekindle.engine.weights import identify, locate, recorded
from rekindle.environment import describe_environment
from rekindle.errors import CapabilityError, DumpError, NotDumpableError, UsageError
from rekindle.fields import JSON
from rekindle.files import PAGE_BYTES, copy_sparse_tree, remove_tree, size_bytes
from rekindle.node.loaded import Loaded
from rekindle.node.mapped import MappedFile
from rekindle.os_errors import naming_full_disk
from rekindle.record import Dump, Oracle, Process, Record, RecordedCriu, RecordedEngine, StoredFile
from rekindle.report import Report
from rekindle.secrets.redact import redact_command
from rekindle.text import listed
from snapshot import foreign_dump, secret_search, start_reads
from snapshot.aftermath import telling_server
from snapshot.compact import compact
from snapshot.cuda_state import CudaState, checkpointed, require_state
from snapshot.describe import (
    Dumped,
    RunningServer,
    inherited_credentials,
    listened_endpoint,
    listened_endpoints,
    main_first,
    mapped_files,
    mapped_huge_pages,
    node_of,
    opened_files,
    readable_path,
    without_secrets,
)
from snapshot.hooks import before_snapshot
from snapshot.loaded import Sources
from snapshot.loaded import describe as describe_loaded
from snapshot.obstacles import require_dumpable
from snapshot.opened import OpenedFiles, WhatWasRead
from snapshot.outside_connections import Ending, Outside, OutsideConnection, end_before_dump
from snapshot.outside_connections import find as find_outside
from snapshot.private_paths import PrivatePaths
from snapshot.private_paths import find as find_private
from snapshot.private_paths import keep as keep_private
from snapshot.private_paths import tell as tell_private
from snapshot.server import TEMPORARY, Server, make_temporary
from snapshot.warm import known_oracle, wait_ready, warm

if TYPE_CHECKING:
    from rekindle.cuda.backend import Backend


_ATTEMPTS = 3


class ServerSpec(Struct, frozen=True, kw_only=True):
    """The server to snapshot, and how to start it.

    `ready_timeout` is in seconds. `warm_requests` None means the engine's own. `find_backend` returns the
    backend for CUDA checkpoints; None if this node has no NVIDIA GPU. `withheld` are the names of variables
    that were taken out of `environment`. `reseed` is what to reseed after a restore, `outside` what to do
    about connections to the outside.
    """

    argv: Sequence[str]
    environment: Mapping[str, str]
    network: Network
    ready_timeout: float
    warm_requests: Sequence[Sequence[Request]] | None
    credentials: secret_search.KnownSecrets
    reseed: Reseed = Reseed.UNSEEDED
    check_memory: bool = True
    find_backend: "Callable[[], Backend] | None" = None
    withheld: frozenset[str] = frozenset()
    outside: Outside = Outside.REFUSE


class WarmServer(Struct, frozen=True, kw_only=True):
    """A server that is ready, warm and answers.

    `began_ns` is when it was started, in nanoseconds since 1970, `start_seconds` how long it took to be
    ready. `stop_watching` ends the watch for what it reads. With `runs_on`, it is not ours to end. `hold`,
    which may be called again, holds its clients back; it is called as late as possible.
    """

    cell: Cell
    server: Server
    oracle: Oracle
    reads: WhatWasRead
    began_ns: int
    start_seconds: float
    stop_watching: Callable[[], None]
    runs_on: bool = False
    hold: Callable[[], None] = lambda: None


Start = Callable[[ServerSpec, Engine, Path, Report], contextlib.AbstractContextManager[WarmServer]]
"""Brings a server up, or finds one that runs: spec, engine, work directory, report."""


class _ProcessState(Struct, frozen=True, kw_only=True):
    """The state beside a dump of processes: CUDA state, clocks, private paths, closed connections."""

    cuda: CudaState
    clocks: Clocks
    kept: PrivatePaths
    closed: tuple[str, ...]


def make(
    spec: ServerSpec,
    engine: Engine,
    tool: Criu,
    work: Path,
    report: Report,
    scan: Callable[[Path], list[StoredFile]],
    keep_untouched: Callable[[Path], None] | None = None,
    start: Start | None = None,
) -> Dumped:
    """Start the server, by `start` if given, dump it into `work/dump/{criu,memory,shm}`, and describe it.

    `scan` lists the files of a dump. `keep_untouched` is called with CRIU's dump before it is compacted.
    The server has ended when this returns or raises, unless it is another's. Raises SecretError if the dump
    holds a credential that was not allowed.
    """
    _check_preconditions(spec)
    tree = _make_tree(work)
    with (start or _started)(spec, engine, work, report) as started:
        server, reads, began_ns = started.server, started.reads, started.began_ns
        hooked = before_snapshot(started.cell, server, report)
        ends = not started.runs_on
        with report.phase("check"), telling_server(started.cell, server.root_pid, engine, ends=ends):
            try:
                running = _inspect(started, spec, engine, tool, work)
            except NotDumpableError:  # of clients, perhaps
                started.hold()
                running = _inspect(started, spec, engine, tool, work)
        tell_private(running.private, report.say)
        started.stop_watching()  # CRIU reads files in the cell, too
        started.hold()
        dumped = _dump(started, spec, engine, running, tool, work, report)
        cuda, kept = dumped.cuda, dumped.kept
    with report.phase("compact"):
        dump_bytes = size_bytes(tree / "criu")
        require_state(cuda, dump_bytes)
        if keep_untouched:
            keep_untouched(tree)
        memory = compact(tree, server.root_pid)
        files = scan(tree)
        mapped = mapped_files({path for path in running.opened if not kept.holds(path)})
    with report.phase("search for secrets"):
        secret_search.require_no_secrets(tree, spec.credentials)
    with report.phase("find caches"):
        readable = functools.partial(readable_path, tree=tree)
        roots = find_caches.find(server.environment, running.opened, readable, usual_places=engine.compiles)
    weights = _weights(engine, spec, report)
    with report.phase("describe files"):
        beside = [*(f"{each.recorded}/" for each in roots), f"{work}/"]
        read = _loaded(spec, server, reads, began_ns, weights, beside, mapped, report, kept)
    values, variables = describe_environment(
        spec.environment, engine, spec.credentials.values, spec.withheld, spec.argv
    )
    record = Record(
        created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        made_by=f"rekindle {__version__}",
        engine=RecordedEngine(name=engine.name, options=engine.options()),
        command=redact_command(spec.argv, spec.credentials.values),
        directory=str(Path.cwd()),
        environment=values,
        variables=variables,
        endpoint=running.listeners[0],
        listeners=running.listeners,
        oracle=started.oracle,
        node=node_of(spec.argv, server.environment, running),
        criu=RecordedCriu(version=tool.version),
        process=_process(spec, server, running, hooked, dumped),
        mapped_files=without_secrets(mapped, read),
        dump=Dump(
            dump_bytes=dump_bytes,
            stored_bytes=size_bytes(tree / "criu") + sum(each.data_bytes for each in memory),
            files=files,
            memory=tuple(stored_memory(each) for each in memory),
        ),
        weights=weights,
        loaded=read,
        reads=start_reads.describe(running.reads, reads.written, beside),
        start_seconds=round(started.start_seconds, 3),
    )
    return Dumped(record=record, caches=roots)


def _make_tree(work: Path) -> Path:
    tree = work / "dump"
    for directory in (tree, *(tree / top for top in TOPS)):
        directory.mkdir(mode=0o700)
    return tree


@contextlib.contextmanager
def _started(spec: ServerSpec, engine: Engine, work: Path, report: Report) -> Iterator[WarmServer]:
    """Start the server in a new cell, which ends with the context."""
    with Cell() as cell, contextlib.ExitStack() as watching:
        with report.phase("cell"):
            cell.enter(spec.network)
        began_ns = time.time_ns()
        reads = watching.enter_context(OpenedFiles(cell))
        server, start_seconds, oracle = _bring_up(cell, spec, engine, work, report)
        yield WarmServer(
            cell=cell,
            server=server,
            oracle=oracle,
            reads=reads,
            began_ns=began_ns,
            start_seconds=start_seconds,
            stop_watching=watching.close,
        )


def _bring_up(
    cell: Cell, spec: ServerSpec, engine: Engine, work: Path, report: Report
) -> tuple[Server, float, Oracle]:
    """Start the server in the cell, warm it, ask the oracle, and quiesce it if its engine can sleep.

    Returns the server, the seconds that it took to become ready, and the oracle.
    """
    make_temporary(cell)
    engine.enter(cell.root)
    argv, environment = engine.launch(spec.argv, spec.environment)
    gpus = spec.find_backend is not None
    server = Server(cell, argv, environment, Path.cwd(), work, spec.reseed, gpus=gpus)
    client = Client(engine.endpoint, cell.connect)
    with report.phase("ready"):
        began = time.monotonic()
        wait_ready(server, engine, client, spec.ready_timeout, say=report.say)
        start_seconds = time.monotonic() - began
    with report.phase("warm"):
        batches = spec.warm_requests
        warm(server, engine, client, engine.warm_requests(client) if batches is None else batches)
    with report.phase("oracle"):
        oracle = known_oracle(server, engine, client)
    if engine.options().get("asleep"):
        with report.phase("quiesce"):
            engine.quiesce(client, oracle.answer, engine.authorize(oracle.request, os.environ))
    return server, start_seconds, oracle


def _inspect(started: WarmServer, spec: ServerSpec, engine: Engine, tool: Criu, work: Path) -> RunningServer:
    """Describe the server's processes and remove its disposable files. Raise if it cannot be dumped."""
    cell, server = started.cell, started.server
    own = {str(server.stdout), str(server.stderr)}
    gpus = spec.find_backend is not None
    pids = processes.tree(cell, server.root_pid)
    opened = opened_files(cell, pids) - own
    caches = find_caches.find(server.environment, opened, lambda path: cell.root / path.lstrip("/"))
    private = find_private(
        cell,
        pids,
        since_ns=started.began_ns,
        environment=server.environment,
        own=own,
        opened=opened,
        left_out=[*(each.recorded for each in caches), *find_caches.models(server.environment)],
    )
    found = (cell, server.root_pid, spec.network, tool)
    require_dumpable(*found, private=private, work=work, outside=spec.outside, gpus=gpus)
    listeners = listened_endpoints(cell, pids)
    running = RunningServer(
        listeners=main_first(listened_endpoint(engine, listeners), listeners),
        server_pid=server.server_pid,
        threads=sum(processes.threads(cell, pid) for pid in pids),
        opened=opened,
        private=private,
        settings=read_settings(cell, server.root_pid),
        credentials=inherited_credentials(cell, server.root_pid),
        huge_pages=mapped_huge_pages(cell, pids),
        reads=start_reads.find(cell, started.reads),
    )
    if cell.only is None:
        _drop_disposable(cell, pids, engine.disposable())
    return running


def _dump(
    started: WarmServer,
    spec: ServerSpec,
    engine: Engine,
    running: RunningServer,
    tool: Criu,
    work: Path,
    report: Report,
) -> _ProcessState:
    """Dump the server with what is in /dev/shm or private."""
    tree, cell, root = work / "dump", started.cell, started.server.root_pid
    with (
        telling_server(cell, root, engine, ends=not started.runs_on),
        checkpointed(cell, spec.find_backend, work, report, check_memory=spec.check_memory) as cuda,
        report.phase("dump"),
        naming_full_disk(work),
        contextlib.ExitStack() as frozen,
    ):
        closed: tuple[str, ...] = ()
        close_in_image: Callable[[], tuple[str, ...]] = tuple
        if cell.only is not None:
            close_in_image = foreign_dump.freeze(tool, cell, root, tree / "criu", work, frozen, report)
        elif started.runs_on:
            frozen.enter_context(FrozenDump(tool, cell, root, tree / "criu", logs=work))
        else:
            closed = _call_criu(cell, root, spec, tool, work)
        clocks = cell.clocks()
        others = set() if cell.only is None else foreign_dump.of_others(cell, tree / "criu")
        copy_sparse_tree(cell.root / "dev/shm", tree / "shm", without={MEMORY_PLACE.parts[3], *others})
        kept = keep_private(cell, running.private, tree / "shm")
    closed = closed or close_in_image()
    if closed:
        report.closed = list(closed)
        report.say(f"closed in the image, since they lead out of the server: {listed(closed)}")
    return _ProcessState(cuda=cuda, clocks=clocks, kept=kept, closed=closed)


def _call_criu(cell: Cell, root: int, spec: ServerSpec, tool: Criu, work: Path) -> tuple[str, ...]:
    """Let CRIU dump the server, and close connections to the outside in the dump; return their names.

    A server may connect again while it is dumped. After a failure it runs on, so that this can be repeated.
    """
    directory = work / "dump" / "criu"
    if spec.outside is Outside.REFUSE:
        criu.dump(tool, cell, root, directory)
        return ()
    closed: dict[int, OutsideConnection] = {}
    for attempt in range(_ATTEMPTS):
        found = find_outside(cell, root, spec.network, work)
        closed |= {inode: each for inode, each in found.items() if each.name.startswith("unix:")}
        end_before_dump(cell, root, found)
        in_image = [inode for inode, each in closed.items() if each.ending is not Ending.DISCONNECT]
        options = [f"--external=unix[{inode}]" for inode in in_image]
        try:
            criu.dump(tool, cell, root, directory, options=options)
            break
        except DumpError:
            new = find_outside(cell, root, spec.network, work).keys() - found.keys()
            if not new or attempt == _ATTEMPTS - 1:
                raise
            remove_tree(directory)
            directory.mkdir(mode=0o700)
    tcp = connections.close(directory, in_image, tcp=spec.network is Network.HOST)
    return (*sorted(each.name for each in closed.values()), *sorted(f"tcp:{address}" for address in tcp))


def _weights(engine: Engine, spec: ServerSpec, report: Report) -> dict[str, JSON]:
    """Describe the model that the command loads; empty if the engine does not know it."""
    model = engine.model(spec.argv)
    if model is None:
        return {}
    with report.phase("identify weights"):
        return identify(*model, spec.environment)


def _process(
    spec: ServerSpec,
    server: Server,
    running: RunningServer,
    hooked: tuple[int, ...],
    dumped: _ProcessState,
) -> Process:
    return Process(
        root_pid=server.root_pid,
        server_pid=running.server_pid,
        tasks=running.threads,
        network=spec.network,
        monotonic_ns=dumped.clocks.monotonic_ns,
        boottime_ns=dumped.clocks.boottime_ns,
        stdout=str(server.stdout),
        stderr=str(server.stderr),
        gpus=tuple(dumped.cuda.gpus),
        cuda_pids=tuple(dumped.cuda.pids),
        device_bytes=dumped.cuda.device_bytes,
        settings=running.settings,
        hooked=hooked,
        private=dumped.kept.copied,
        made=dumped.kept.made,
        directories=dumped.kept.directories,
        huge_pages=running.huge_pages,
        closed=dumped.closed,
    )


def _loaded(
    spec: ServerSpec,
    server: Server,
    reads: WhatWasRead,
    began_ns: int,
    weights: Mapping[str, JSON],
    beside: Sequence[str],
    mapped: Sequence[MappedFile],
    report: Report,
    private: PrivatePaths,
) -> Loaded:
    """Describe what the server has read since it was started, without what is `beside` or `private`."""
    if reads.problem:
        report.say(
            "WARNING: it is unknown what the server has read, so a restore will notice neither other modules "
            f"nor other files, except those that the command names: {reads.problem}"
        )
    model = recorded(weights)
    place = locate(model.name, model.asked, spec.environment)[0] if model else Path()
    sources = Sources(
        argv=spec.argv,
        environment=server.environment,
        directory=str(Path.cwd()),
        opened=reads.read,
        watched=not reads.problem,
        file_key=server.file_key,
        written=reads.written,
        since_ns=began_ns,
        left_out=beside,
        mapped={file.path for file in mapped},
        described={
            *(*private.copied, *private.made, *private.written),
            *(os.path.realpath(place / file.name) for file in (model.files if model else ())),
        },
    )
    described, left_out = describe_loaded(sources)
    if left_out:
        report.say(f"WARNING: a restore will not compare {left_out:,} of the files that the server has read")
    return described


def _check_preconditions(spec: ServerSpec) -> None:
    """Raise UsageError or CapabilityError for what would otherwise fail after the server has started."""
    if os.sysconf("SC_PAGE_SIZE") != PAGE_BYTES:
        raise CapabilityError(
            f"unsupported page size: {os.sysconf('SC_PAGE_SIZE')} bytes",
            hint=f"boot an OS kernel with pages of {PAGE_BYTES} bytes",
        )
    for word in (str(Path.cwd()), *spec.argv):
        if word.startswith("/dev/shm/"):  # noqa: S108
            raise UsageError(
                f"the server could not access {word}",
                cause="it runs in a cell with a /dev/shm of its own",
                hint="move it to a disk or to another tmpfs",
            )


def _drop_disposable(cell: Cell, pids: Sequence[int], patterns: Sequence[str]) -> None:
    """Remove the engine's disposable files from the server's TMPDIR, except those in use."""
    used = {target for pid in pids for _, target in processes.descriptors(cell, pid)}
    used |= {path for pid in pids for path in processes.mapped_paths(cell, pid)}
    root = cell.root / TEMPORARY.relative_to("/")
    for pattern in patterns:
        for path in root.glob(pattern):
            if str(TEMPORARY / path.relative_to(root)) not in used:
                path.unlink()
