# SPDX-License-Identifier: Apache-2.0
"""Measure the starts of `rekindle bench`, one after the other.

Every start is timed to the first token of the oracle's answer, and then ended:

    cold                    the command, with empty kernel caches
    warm-cache              the command again, with the caches that the cold start left
    cache                   `rekindle restore --rung cache`, with the image's kernel cache and none on disk
    cache-cold-page-cache   the same, with what the server reads dropped from the page cache
    neutral                 `rekindle restore --rung neutral`, likewise on the image's kernel cache
    neutral-cold-page-cache the same, with what the server reads and the dump dropped from the page cache
    process                 `rekindle restore`, with the dump in the page cache
    process-cold-page-cache `rekindle restore`, with the dump dropped from the page cache
    process-registry        `rekindle restore` from --registry, with an empty $REKINDLE_HOME, all of it first
    process-lazy            the same, before all has come
    process-copied          `rekindle restore --memory copy`, with the dump in the page cache
    process-delta           `rekindle restore` of a replica that was saved after ten questions
    criu-plain              `criu restore` of CRIU's unmodified dump in the same cell, without rekindle
"""

import contextlib
import functools
import itertools
import json
import os
import signal
import socket
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct, field

from cli._bench_lazy import await_dump, last_bytes
from cli._bench_milestones import Milestones, with_milestones
from cli._bench_replicas import measure_delta, measure_replicas, times
from oci import image as images
from oci.layout import Layout
from oci.trust.keys import PrivateKey
from rekindle import criu, log
from rekindle.cell import Cell, Command, Network
from rekindle.criu import search
from rekindle.engine import Engine, Request
from rekindle.engine.client import Client
from rekindle.errors import CapabilityError, OracleError, WorkloadError
from rekindle.fields import JSON
from rekindle.files import (
    copy_sparse_tree,
    drop_file_from_page_cache,
    drop_from_page_cache,
    remove_tree,
    write_atomically,
    write_back,
)
from rekindle.home import Home
from rekindle.node import start_reads
from rekindle.record import Record
from rekindle.run import run, spawn
from snapshot.server import TEMPORARY, Server, make_temporary
from snapshot.warm import wait_ready

SCHEMA = "rekindle.bench/1"
_STARTS = (
    "cold",
    "warm-cache",
    "cache",
    "cache-cold-page-cache",
    "neutral",
    "neutral-cold-page-cache",
    "process",
    "process-cold-page-cache",
    "process-registry",
    "process-lazy",
    "process-copied",
    "process-delta",
    "criu-plain",
)
_IMAGE = "bench"
_START_SECONDS = 1800.0
_RESTORE_SECONDS = 300.0
_SETTLE_SECONDS = 1.0


class BenchOptions(Struct, frozen=True, kw_only=True):
    """The server to compare, and how often to start it.

    `cold_runs` is for those that take long: `cold`, `warm-cache`, `cache` and `cache-cold-page-cache`.
    `registry` is the reference to push to; None skips `process-registry`. `replicas` are the numbers of
    replicas to run at once. `delta` saves replicas, too. `ready_url` and `oracle_file` are options of
    `rekindle snapshot`.
    """

    command: tuple[str, ...]
    engine: Engine
    runs: int
    cold_runs: int
    registry: str | None = None
    replicas: tuple[int, ...] = ()
    delta: bool = False
    ready_url: str | None = None
    oracle_file: Path | None = None


class Start(Struct, frozen=True, kw_only=True):
    """One start. Its phases, with `unaccounted`, add up to the time to the first token.

    `report` is that of `rekindle restore`; empty for a start without rekindle.
    """

    phases: dict[str, float]
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        return sum(self.phases.values())


class Bench:
    """One comparison, with a store of its own in its work directory."""

    def __init__(self, options: BenchOptions, home: Home, work: Path) -> None:
        """`home` is where a working CRIU is looked up. Raises CapabilityError if there is none."""
        self._options = options
        self._engine = options.engine
        self._work = work
        self._home = Home(work / "home")
        self._tool = search.find(home)
        self._environment = {**os.environ, "REKINDLE_HOME": str(self._home.root)}
        self._environment["REKINDLE_CRIU"] = str(self._tool.path)
        self._environment["COSIGN_PASSWORD"] = ""
        self._peaks: dict[str, int] = {}
        self._answer: JSON = None
        self._proof: dict[str, Any] | None = None

    def run(self) -> dict[str, Any]:
        """Measure all starts and return the document that `rekindle bench --json` prints.

        Raises WorkloadError if the snapshot, the push or a restore fails, OracleError if two starts give
        different answers.
        """
        runs, cold_runs = self._options.runs, self._options.cold_runs
        starts: dict[str, list[Start]] = {}
        caches = self._work / "caches"
        for number in range(cold_runs):
            caches = self._work / f"caches-{number}"
            self._add(starts, "cold", self._command_start(caches))
        for _ in range(cold_runs):
            self._add(starts, "warm-cache", self._command_start(caches))
        image = self._snapshot(caches)
        record, image_bytes = image.record, image.size_bytes
        lower = {"cache": image.cache, "neutral": image.neutral}
        for _, rung in itertools.product(range(cold_runs), [rung for rung, there in lower.items() if there]):
            self._add(starts, rung, self._lower_start(rung, caches))
            self._add(starts, f"{rung}-cold-page-cache", self._lower_start(rung, caches, record.reads))
        dump = self._home.dumps / image.process.digest.hex
        for directory in (dump, self._work / "plain"):
            write_back(directory)
        copying = ["--memory", "copy"]
        self._restore_start(options=copying)  # the first one writes the images that CRIU copies from
        alternated: list[tuple[str, Callable[[], Start]]] = [
            ("process", self._restore_start),
            ("process-copied", lambda: self._restore_start(options=copying)),
            ("criu-plain", lambda: self._plain_start(record)),
        ]
        for _ in range(runs):
            for name, start in alternated:
                self._add(starts, name, start())
            # Noise affects all alike, and what a start leaves behind (a host takes freed memory back) does
            # not always affect the same next one.
            alternated.reverse()
        for _ in range(runs):
            drop_from_page_cache(dump)
            self._add(starts, "process-cold-page-cache", self._restore_start())
        replicas = []
        if counts := self._options.replicas:
            request, answer = record.oracle.request, record.oracle.answer
            replicas = measure_replicas(counts, self._replica, self._engine, request, answer)
            for each in replicas:
                log.write(f"replicas: {each['n']} {each['memory']}, {each['memory_bytes']:,} bytes")
        deltas = []
        for number in range(runs if self._options.delta else 0):
            name = f"{_IMAGE}-delta-{number}"
            deltas.append(measure_delta(self._home, _IMAGE, name, self._tool, self._work, self._engine))
            log.write(f"delta {deltas[-1]['dump_seconds']:.2f} s, {deltas[-1]['dump_bytes']:,} bytes")
            self._add(starts, "process-delta", self._restore_start(name))
        if registry := self._options.registry:
            self._push(registry)
            for _ in range(runs):
                self._add(starts, "process-registry", self._registry_start(registry, "never"))
                self._add(starts, "process-lazy", self._registry_start(registry, "always"))
        return {
            "schema": SCHEMA,
            "n": runs,
            "starts": {name: _summary(starts[name]) for name in _STARTS if name in starts},
            "dump_bytes": record.dump.dump_bytes,
            "image_bytes": image_bytes,
            "peak_rss_bytes": self._peaks,
            "cache": self._proof,
            "replicas": replicas,
            "delta": _medians(deltas),
            "answer": record.oracle.answer,
        }

    def _add(self, starts: dict[str, list[Start]], name: str, start: Start) -> None:
        starts.setdefault(name, []).append(start)
        log.write(f"{name} {start.seconds:.2f} s")
        time.sleep(_SETTLE_SECONDS)

    def _command_start(self, caches: Path) -> Start:
        """Start the command itself. The cell only serves to end it with all its processes."""
        logs = self._work / "logs"
        for directory in (caches, caches / "tmp", logs):
            directory.mkdir(exist_ok=True)
        for old in logs.iterdir():
            old.unlink()
        environment = {**os.environ, **self._engine.cache_environment(caches)}
        with Cell() as cell:
            cell.enter(Network.PRIVATE)
            self._keep_temporary(cell, caches / "tmp")
            began = time.monotonic()
            server = Server(cell, self._options.command, environment, Path.cwd(), logs)
            client = Client(self._engine.endpoint, cell.connect)
            clock = Milestones(self._engine, (server.stdout, server.stderr), began)
            wait_ready(server, self._engine, client, _START_SECONDS, meanwhile=clock.update)
            clock.mark("ready")
            first = self._first_token(client, self._engine.oracle_request(client))
            clock.mark("first token", at=first)
            return Start(phases=clock.phases)

    def _keep_temporary(self, cell: Cell, directory: Path) -> None:
        """Mount a directory on disk over TMPDIR, since compilers keep caches there, too.

        Setting another TMPDIR would not do: the path of a socket is limited to 107 bytes.
        """
        make_temporary(cell)
        argv = ["mount", "--bind", str(directory), str(TEMPORARY)]
        if status := cell.run(Command(argv=argv, env=os.environ, cwd=Path("/")), _RESTORE_SECONDS):
            raise CapabilityError(f"mount ended with status {status}", command=argv)

    def _snapshot(self, caches: Path) -> images.Image:
        environment = {**self._environment, **self._engine.cache_environment(caches)}
        report = self._work / "snapshot.json"
        options = ["--report", str(report), "--keep-dump", str(self._work / "plain")]
        options += ["--sign-key", str(self._key())]
        for name in os.environ:  # the image is removed with the work directory
            options += ["--allow-secret", name]
        if self._options.ready_url:
            options += ["--ready-url", self._options.ready_url]
        if self._options.oracle_file:
            options += ["--oracle-request", str(self._options.oracle_file)]
        argv = [*_rekindle(), "snapshot", _IMAGE, "--neutral", *options, "--", *self._options.command]
        done = run(argv, timeout=_START_SECONDS * 2, env=environment)
        if done.status != 0:
            raise WorkloadError("the snapshot failed", cause=done.output, command=argv)
        self._peaks["snapshot"] = json.loads(report.read_bytes())["peak_rss_bytes"]
        layout = Layout(self._home.store)
        return images.load(layout, layout.resolve(f"{_IMAGE}:latest"))

    def _key(self) -> Path:
        """Write a key pair and return the private key: an image from a registry must be signed."""
        key = PrivateKey.generate()
        write_atomically(self._work / "bench.key", key.to_pem(), mode=0o600)
        write_atomically(self._work / "bench.pub", key.public.to_pem())
        return self._work / "bench.key"

    def _push(self, registry: str) -> None:
        report = self._work / "push.json"
        argv = [*_rekindle(), "push", _IMAGE, registry, "--report", str(report)]
        done = run(argv, timeout=_START_SECONDS, env=self._environment)
        if done.status != 0:
            raise WorkloadError("the push failed", cause=done.output, command=argv)
        document = json.loads(report.read_bytes())
        self._peaks["push"] = document["peak_rss_bytes"]
        log.write(f"push {document['seconds']:.2f} s")

    def _registry_start(self, registry: str, lazy: str) -> Start:
        """Restore as on a fresh node, without a store or remembered facts about its CRIU."""
        home = self._work / "empty"
        try:
            return self._restore_start(
                registry,
                {"REKINDLE_HOME": str(home)},
                ["--verify-key", str(self._work / "bench.pub"), "--lazy", lazy],
                peak="restore-registry",
                until=functools.partial(await_dump, home),
            )
        finally:
            remove_tree(home)

    def _lower_start(self, rung: str, caches: Path, dropped: str = "") -> Start:
        """Restore as on a node that cannot restore the process and has no kernel cache of its own.

        What a record says in `dropped` that a start reads is dropped from the page cache before, with the
        image.
        """
        for path in self._engine.cache_environment(caches).values():
            remove_tree(Path(path))
        if dropped:
            for read in start_reads.decode(dropped):
                with contextlib.suppress(OSError):
                    drop_file_from_page_cache(Path(read.path))
            for directory in (self._home.store, self._home.dumps):
                write_back(directory)
                drop_from_page_cache(directory)
        start = self._restore_start(
            options=["--rung", rung], outcome=rung, peak=f"restore-{rung}", seconds=_START_SECONDS
        )
        if rung == "cache":
            proof = start.report["cache"] or {}
            names = ("verdict", "entries", "used", "made", "made_seconds")
            self._proof = {name: proof.get(name) for name in names}
        return start

    @contextlib.contextmanager
    def _replica(self, number: int, options: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Run a replica on a port of its own. See `cli._bench_replicas.Restore`."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        options = ["--publish", f"127.0.0.1:{port}", *options]
        with self._restored(_IMAGE, options, name=f"replica-{number}") as running:
            yield running

    @contextlib.contextmanager
    def _restored(
        self,
        image: str,
        options: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        name: str = "restore",
        outcome: str = "restored",
        seconds: float = _RESTORE_SECONDS,
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """Run `rekindle restore` as a user would; yield its PID and its report once the server is ready."""
        report, log = self._work / f"{name}.json", self._work / f"{name}.log"
        report.unlink(missing_ok=True)
        argv = [*_rekindle(), "restore", image, "--report", str(report), *options]
        with open(log, "wb") as output:
            process = spawn(
                argv,
                env={**self._environment, **(environment or {})},
                stdout=output.fileno(),
                stderr=output.fileno(),
            )
            try:
                clock = Milestones(self._engine, [log], time.monotonic())
                document = _await_report(report, process.poll, clock.update, log, outcome, seconds)
                yield process.pid, with_milestones(document, clock.phases)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL if outcome == "restored" else signal.SIGTERM)
                process.wait()

    def _restore_start(
        self,
        image: str = _IMAGE,
        environment: Mapping[str, str] | None = None,
        options: Sequence[str] = (),
        *,
        peak: str = "restore",
        outcome: str = "restored",
        seconds: float = _RESTORE_SECONDS,
        until: Callable[[dict[str, Any]], None] = lambda _: None,
    ) -> Start:
        """Restore, call `until` with the report while the server runs, and take the phases from it."""
        with self._restored(image, options, environment=environment, outcome=outcome, seconds=seconds) as (
            _,
            document,
        ):
            until(document)
        self._peaks[peak] = max(self._peaks.get(peak, 0), document["peak_rss_bytes"])
        if document["first_token_seconds"] is None:
            problem = document["oracle"].get("lack", "")
            raise WorkloadError(f"the restored server gave no answer: {problem or 'it was not asked'}")
        first = float(document["first_token_seconds"])
        phases = {phase["name"]: float(phase["seconds"]) for phase in document["phases"]}
        if "oracle" in phases:  # that phase lasts to the end of the answer
            phases.pop("oracle")
            phases["first token"] = float(document["oracle"]["first_token_seconds"])
        phases["unaccounted"] = max(0.0, first - sum(phases.values()))
        return Start(phases=phases, report=document)

    def _plain_start(self, record: Record) -> Start:
        """Restore with CRIU alone, in a cell like that of `rekindle restore`."""
        marks = [("", time.monotonic())]
        with Cell() as cell:
            cell.enter(record.process.network, record.process.clocks)
            copy_sparse_tree(self._work / "plain" / "shm", cell.root / "dev/shm")
            marks.append(("cell", time.monotonic()))
            with open(self._work / "plain.log", "ab") as log:
                output = {Path(name): log.fileno() for name in (record.process.stdout, record.process.stderr)}
                criu.restore(self._tool, cell, self._work / "plain" / "criu", inherit=output, home=self._home)
            marks.append(("restore", time.monotonic()))
            client = Client(record.endpoint, cell.connect)
            marks.append(("first token", self._first_token(client, record.oracle.request)))
        pairs = itertools.pairwise(marks)
        return Start(phases={name: at - before for (_, before), (name, at) in pairs})

    def _first_token(self, client: Client, request: Request) -> float:
        """Ask the oracle; return when its answer began, by time.monotonic.

        Raises OracleError if it differs from the first start's answer.
        """
        response = client.ask(self._engine.authorize(request, os.environ), timeout=_START_SECONDS)
        answer = self._engine.answer(response)
        if self._answer is None:
            self._answer = answer
        if not self._engine.agree(self._answer, answer):
            raise OracleError(
                "two starts of the same server gave different answers, so they cannot be compared",
                cause=f"first {json.dumps(self._answer)[:300]}, now {json.dumps(answer)[:300]}",
            )
        return response.first_byte


def _await_report(
    report: Path,
    poll: Callable[[], int | None],
    meanwhile: Callable[[], None],
    log: Path,
    outcome: str,
    seconds: float,
) -> dict[str, Any]:
    deadline = time.monotonic() + seconds
    while not report.exists():
        ended = poll() is not None and not report.exists()
        if ended or time.monotonic() > deadline:
            raise WorkloadError("the restore failed", cause=log.read_text(errors="replace")[-4000:])
        meanwhile()
        time.sleep(0.005)
    document = json.loads(report.read_bytes())
    if document["outcome"] != outcome:
        raise WorkloadError("the restore failed", cause=str(document["error"] or document["reasons"]))
    assert isinstance(document, dict)
    return document


def _rekindle() -> list[str]:
    """Return the command line prefix of this rekindle."""
    return [sys.executable, "-m", "rekindle"]


def _medians(deltas: Sequence[Mapping[str, float]]) -> dict[str, float] | None:
    """Return the median of each figure; None if there are none."""
    if not deltas:
        return None
    return {name: round(statistics.median(each[name] for each in deltas), 4) for name in deltas[0]}


def _summary(runs: Sequence[Start]) -> dict[str, Any]:
    """Summarise runs. The phases are those of the median run, so that they add up to its time."""
    ordered = sorted(runs, key=lambda run: run.seconds)
    seconds = [run.seconds for run in ordered]
    middle = ordered[(len(ordered) - 1) // 2]
    return {
        "n": len(runs),
        "first_token_seconds": times(seconds),
        "phases": {name: round(value, 4) for name, value in middle.phases.items()},
        **({"last_byte_seconds": times(last)} if (last := last_bytes([run.report for run in runs])) else {}),
    }
