# SPDX-License-Identifier: Apache-2.0
"""Measure several replicas of one snapshot at once, and the delta of one that has worked."""

import contextlib
import itertools
import json
import os
import socket
import statistics
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import psutil

from oci import image as images
from oci import resolve
from oci.options import RegistryOptions
from oci.reference import parse
from oci.trust import verifier
from rekindle.cell import Cell
from rekindle.criu import Criu
from rekindle.engine import Endpoint, Engine, Request
from rekindle.engine.client import Client
from rekindle.errors import OracleError
from rekindle.fields import JSON
from rekindle.home import Home
from rekindle.report import MemoryMode, Report
from restore import dumps
from restore.options import Output
from restore.rungs import process
from snapshot import ReplicaOptions, RunningReplica, save_replica

_ANSWER_SECONDS = 300.0
_QUESTIONS = 10


class Restore(Protocol):
    """Start a replica: `rekindle restore` in the foreground, until the context is left."""

    def __call__(
        self, number: int, options: Sequence[str]
    ) -> contextlib.AbstractContextManager[tuple[int, Mapping[str, Any]]]:
        """Return a context with the PID of rekindle and the report of the restore."""


def measure_replicas(
    counts: Sequence[int], restore: Restore, engine: Engine, request: Request, answer: JSON
) -> list[dict[str, Any]]:
    """Restore replicas one after the other, all of which stay, and ask all of them at once.

    Returns for each of `counts` the times of so many restores, and the memory of all with rekindle. Before
    these, an entry for one replica whose memory was copied. Raises OracleError for a wrong answer.
    """
    with restore(0, ["--memory", "copy"]) as (pid, report):
        found = [_entry([report], [pid])]
    reports: list[Mapping[str, Any]] = []
    pids: list[int] = []
    with contextlib.ExitStack() as stack:
        for number in range(max(counts)):
            pid, report = stack.enter_context(restore(number, []))
            pids.append(pid)
            reports.append(report)
            if len(pids) in counts:
                _ask_all([each["endpoint"] for each in reports], engine, request, answer)
                found.append(_entry(reports, pids))
    return found


def _entry(reports: Sequence[Mapping[str, Any]], pids: Sequence[int]) -> dict[str, Any]:
    return {
        "n": len(reports),
        "memory": reports[0]["memory"]["mode"],
        "memory_bytes": memory_bytes(pids),
        "first_token_seconds": times([each["first_token_seconds"] for each in reports]),
    }


def _ask_all(endpoints: Sequence[str], engine: Engine, request: Request, answer: JSON) -> None:
    def ask(endpoint: str) -> JSON:
        host, _, port = endpoint.rpartition(":")
        client = Client(Endpoint(host=host, port=int(port)), _connect)
        return engine.answer(client.ask(engine.authorize(request, os.environ), timeout=_ANSWER_SECONDS))

    with ThreadPoolExecutor(len(endpoints)) as pool:
        for got in pool.map(ask, endpoints):
            if not engine.agree(answer, got):
                raise OracleError(
                    "one of several replicas gave another answer",
                    cause=f"expected {json.dumps(answer)[:300]}, got {json.dumps(got)[:300]}",
                )


def _connect(host: str, port: int, timeout: float) -> socket.socket:
    return socket.create_connection((host, port), timeout)


def memory_bytes(pids: Sequence[int]) -> int:
    """Return the memory of processes and all their descendants; of what N processes share, each has 1/N."""
    total = 0
    for pid in pids:
        for each in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                total += each.memory_full_info().pss
    return total


def measure_delta(
    home: Home, image: str, target: str, tool: Criu, work: Path, engine: Engine
) -> dict[str, float]:
    """Restore a replica, ask it ten questions, and save it as `target`.

    Returns the seconds of the dump, and of all until the image is published; the bytes that the dump takes on
    disk, and those of the image's own layers.
    """
    reference, report = parse(image), Report(verb="snapshot")
    log = os.open(work / "replica.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, log)
        found = stack.enter_context(resolve.source(reference, home, RegistryOptions()))
        verified = verifier.dangerously_skip(images.load(found.blobs, found.root))  # we have just made it
        here = stack.enter_context(home.work("restore"))
        dump = stack.enter_context(dumps.ready(home, here, verified, Report(verb="restore")))
        cell = stack.enter_context(Cell())
        base, restored, output = verified.value, Report(verb="restore"), Output(stdout=log, stderr=log)
        process.restore(
            cell, base.record, dump, tool=tool, home=home, work=here, output=output, report=restored
        )
        client = Client(base.record.endpoint, cell.connect)
        asked = list(itertools.chain.from_iterable(engine.warm_requests(client))) or [
            base.record.oracle.request
        ]
        for request in itertools.islice(itertools.cycle(asked), _QUESTIONS):
            client.ask(engine.authorize(request, os.environ), timeout=_ANSWER_SECONDS)
        mapped = restored.memory is not None and restored.memory.mode is MemoryMode.MAPPED
        replica = RunningReplica(
            cell=cell, image=base, reference=reference, dump=dump if mapped else None, output=output
        )
        began = time.monotonic()
        options = ReplicaOptions(image=target, secrets=tuple(os.environ))
        saved = save_replica(replica, options, report, home=home)
        seconds = time.monotonic() - began
    phases = {phase.name: phase.seconds for phase in report.phases}
    known = {layer.digest for layer in base.layers}
    return {
        "dump_seconds": phases["dump"],
        "save_seconds": seconds,
        "dump_bytes": report.bytes.dump or 0,
        "image_bytes": sum(layer.size for layer in saved.layers if layer.digest not in known),
    }


def times(seconds: Sequence[float]) -> dict[str, float]:
    """Return the median, the least and the most of some times."""
    return {
        "median": round(statistics.median(seconds), 4),
        "min": round(min(seconds), 4),
        "max": round(max(seconds), 4),
    }
