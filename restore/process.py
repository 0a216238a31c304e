# SPDX-License-Identifier: Apache-2.0
"""The process rung: a dump becomes the running server again, and proves it."""

import importlib
import json
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from rekindle import criu
from rekindle.cell import Cell, exit_status
from rekindle.criu import Criu
from rekindle.engine import Engine, restored
from rekindle.errors import OracleError, RestoreError
from rekindle.files import copy_sparse_tree, naming_full_disk
from rekindle.home import Home
from rekindle.record import Record
from rekindle.report import Report

_ANSWER_SECONDS = 60.0


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
) -> None:
    """Fills a cell that was just booted with the server, and asks the oracle.

    `engine` is who asks: the one that the record names, if it is not given.

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
    with report.phase("oracle"):
        engine = engine or restored(record.engine, record.endpoint, record.engine_options)
        _prove(cell, record, engine, report)


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
