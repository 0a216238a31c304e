# SPDX-License-Identifier: Apache-2.0
"""The process rung: a dump becomes the running server again, and proves it."""

import importlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from rekindle import criu, processes
from rekindle.cell import Cell, exit_status
from rekindle.criu import Criu
from rekindle.engine import Engine, restored
from rekindle.errors import CapabilityError, OracleError, RestoreError
from rekindle.files import copy_sparse_tree, naming_full_disk
from rekindle.home import Home
from rekindle.record import Record
from rekindle.report import Report

if TYPE_CHECKING:
    from rekindle.cuda import Door

_ANSWER_SECONDS = 60.0


class Cuda:
    """How CUDA state comes back: the door to the driver, and which GPU takes the place of which, by UUID;
    empty if they are the same.

    To open the door takes seconds, so it begins with this, in a thread of its own. As a context, it is closed
    at the end.
    """

    def __init__(self, find: "Callable[[], Door]", device_map: Mapping[str, str]) -> None:
        self.device_map = device_map
        self._found: Door | None = None
        self._error: BaseException | None = None
        self._ready, self._over = threading.Event(), threading.Event()
        threading.Thread(target=self._open, args=[find], daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._ready.is_set() and self._found is not None:
            self._found.close()

    def door(self) -> "Door":
        """Waits until it is open. Raises CapabilityError if there is none, CudaError."""
        self._ready.wait()
        if self._error is not None:
            raise self._error
        assert self._found is not None
        return self._found

    def _open(self, find: "Callable[[], Door]") -> None:
        try:
            self._found = find()
        except BaseException as error:
            self._error = error
        self._ready.set()
        # What was started for it ends with the thread that started it.
        self._over.wait()


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """Our descriptors that the server gets as its standard output and standard error."""

    stdout: int
    stderr: int


def restore(
    cell: Cell,
    record: Record,
    dump: Path,
    *,
    tool: Criu,
    home: Home,
    work: Path,
    output: Output,
    report: Report,
    engine: Engine | None = None,
    cuda: Cuda | None = None,
) -> None:
    """Fills a cell that was just booted with the server, and asks the oracle.

    `engine` is who asks: the one that the record names, if it is not given. `cuda` is needed for a server
    that held CUDA state.

    Raises RestoreError or OracleError; the caller ends the cell then, and nothing is left of the try.
    """
    process = record.process
    with report.phase("cell"):
        cell.enter(process.network, process.clocks)
        with naming_full_disk("the cell's /dev/shm", hint="the node is short of memory"):
            copy_sparse_tree(dump / "shm", cell.root / "dev/shm")
    # The HTTP client takes 30 ms to import: that is done while CRIU works.
    threading.Thread(target=importlib.import_module, args=["rekindle.engine.client"], daemon=True).start()
    with report.phase("restore"):
        criu.restore(
            tool,
            cell,
            dump / "criu",
            inherit={Path(process.stdout): output.stdout, Path(process.stderr): output.stderr},
            log_directory=work,
            home=home,
        )
    engine = engine or restored(record.engine, record.endpoint, record.engine_options)
    if process.cuda_pids:
        with report.phase("cuda"):
            _restore_cuda(cell, process.cuda_pids, cuda, work)
    if engine.options().get("asleep"):
        _wake(cell, record, engine, report)
    with report.phase("oracle"):
        _prove(cell, record, engine, report)


def _restore_cuda(cell: Cell, pids: Sequence[int], cuda: Cuda | None, work: Path) -> None:
    """Gives the processes their GPUs back."""
    from rekindle.cuda import Session

    if cuda is None:
        raise CapabilityError("the server held CUDA state, and nothing here restores it")
    outside = {processes.inner_pid(pid): pid for pid in processes.host_pids(cell)}
    if missing := [pid for pid in pids if pid not in outside]:
        raise RestoreError("processes with CUDA state were not restored", cause=f"PIDs {missing}")
    holders = [outside[pid] for pid in pids]
    Session(cuda.door(), holders, journal=work / "cuda.json").restore_all(cuda.device_map)


def _wake(cell: Cell, record: Record, engine: Engine, report: Report) -> None:
    from rekindle.engine.client import Client

    def connect(host: str, port: int, timeout: float) -> socket.socket:
        status = cell.wait(record.process.root_pid, 0.0)
        if status is not None:  # else an engine that waits for a port would wait to its deadline
            raise RestoreError(f"the restored server ended with status {exit_status(status)} as it woke")
        return cell.connect(host, port, timeout)

    engine.enter(cell.root)
    engine.wake(Client(record.endpoint, connect), report.phase)


def _prove(cell: Cell, record: Record, engine: Engine, report: Report) -> None:
    from rekindle.engine.client import Client

    client = Client(record.endpoint, cell.connect)
    request = engine.authorize(record.oracle.request, os.environ)
    asked = time.monotonic()
    try:
        response = client.ask(request, timeout=_ANSWER_SECONDS)
    except OSError as error:
        status = cell.wait(record.process.root_pid, 0.1)
        ended = "" if status is None else f", and ended with status {exit_status(status)}"
        raise RestoreError(f"the restored server does not answer{ended}", cause=str(error)) from error
    report.first_token_seconds = response.first_byte - report.began
    answer = engine.answer(response)
    agree = engine.agree(record.oracle.answer, answer)
    report.oracle = {
        "expected": record.oracle.answer,
        "got": answer,
        "match": agree,
        "first_token_seconds": round(response.first_byte - asked, 6),
    }
    if not agree:
        raise OracleError(
            "the restored server gives another answer than the one that was snapshotted",
            cause=f"expected {json.dumps(record.oracle.answer)[:300]}, got {json.dumps(answer)[:300]}",
        )
