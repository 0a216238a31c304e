# SPDX-License-Identifier: Apache-2.0
"""The process rung: a dump becomes the running server again, and proves it."""

import contextlib
import importlib
import json
import os
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rekindle import criu
from rekindle.cell import Cell, exit_status, processes
from rekindle.criu import Criu
from rekindle.engine import Engine
from rekindle.engine.choose import restored
from rekindle.errors import CapabilityError, OracleError, RestoreError
from rekindle.files import copy_sparse_tree
from rekindle.home import Home
from rekindle.os_errors import naming_full_disk
from rekindle.record import Record
from rekindle.report import Report
from restore.options import Output

if TYPE_CHECKING:
    from rekindle.cuda.search import Search

_ANSWER_SECONDS = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Cuda:
    """How CUDA state comes back: what finds the door to the driver, which is starting, and which GPU takes
    the place of which, by UUID; empty if they are the same."""

    search: "Search"
    device_map: Mapping[str, str] = field(default_factory=dict)


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
            _restore_cuda(cell, process.cuda_pids, cuda)
    if engine.options().get("asleep"):
        _wake(cell, record, engine, report)
    with report.phase("oracle"):
        _prove(cell, record, engine, report)


def _restore_cuda(cell: Cell, pids: Sequence[int], cuda: Cuda | None) -> None:
    """Gives the processes their GPUs back."""
    from rekindle.cuda.session import Session

    if cuda is None:
        raise CapabilityError("the server held CUDA state, and nothing here restores it")
    outside = {processes.inner_pid(pid): pid for pid in processes.host_pids(cell)}
    if missing := [pid for pid in pids if pid not in outside]:
        raise RestoreError("processes with CUDA state were not restored", cause=f"PIDs {missing}")
    holders = [outside[pid] for pid in pids]
    with contextlib.closing(cuda.search.door()) as door:
        # If this fails, the processes end with the cell: there is nothing to go back to.
        Session(door, holders).restore_all(cuda.device_map, roll_back=False)


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
