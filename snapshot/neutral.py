# SPDX-License-Identifier: Apache-2.0
"""Make a neutral process: the server's Python with its modules imported, waiting for its command.

It has touched nothing of hardware, so it can be restored on a node with other GPUs, where the server's own
process cannot, and become the server there: docs/adr/0040-neutral.md.
"""

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from msgspec import Struct, structs

from rekindle import criu
from rekindle.cell import Cell, Clocks, Command, Network, exit_status, neutral, processes
from rekindle.command_line import UnclearCommand, unwrap
from rekindle.criu import Criu
from rekindle.dump_tree import TOPS, scan, stored_memory
from rekindle.errors import DumpError, RekindleError
from rekindle.files import copy_sparse_tree, size_bytes
from rekindle.node import packages
from rekindle.node.start_reads import decode
from rekindle.record import Dump, Neutral, Process, Record
from rekindle.report import Report
from snapshot.compact import compact
from snapshot.describe import mapped_files, opened_files
from snapshot.secret_search import KnownSecrets, require_no_secrets

_IMPORT_SECONDS = 600.0
_POLL_SECONDS = 0.05
_HARDWARE = ("/dev/nvidia", "/dev/kfd", "/dev/dri", "/dev/accel", "/dev/infiniband", "/dev/hugepages")
_PLAIN = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")


class _NotNeutralError(Exception):
    """Why there can be no neutral process of this server."""


class _Program(Struct, frozen=True, kw_only=True):
    """A Python script, its interpreter, and the environment that its wrappers give it."""

    python: Path
    script: Path
    environment: Mapping[str, str]


def make(
    record: Record,
    argv: Sequence[str],
    environment: Mapping[str, str],
    credentials: KnownSecrets,
    tool: Criu,
    work: Path,
    report: Report,
) -> Record | None:
    """Make a neutral process of a server that was described, in `work`/dump; return its record.

    Returns None, and says why, if there can be none: the image is worth having without it.
    """
    try:
        with report.phase("neutral"):
            found = _make(record, argv, environment, tool, work)
            require_no_secrets(work / "dump", credentials)
            return found
    except (_NotNeutralError, RekindleError) as error:
        report.say(f"no neutral process: {error}")
        return None


def _make(
    record: Record, argv: Sequence[str], environment: Mapping[str, str], tool: Criu, work: Path
) -> Record:
    program = _program(argv, environment)
    tree = work / "dump"
    for directory in (work, tree, *(tree / top for top in TOPS)):
        directory.mkdir(mode=0o700)
    logs = {name: work / name for name in ("stdin", "stdout.log", "stderr.log")}
    for path in logs.values():
        path.touch()
    with Cell() as cell:
        cell.enter(Network.HOST)
        neutral.install(cell.root, [read.path for read in decode(record.reads)], str(program.script))
        pid = cell.spawn(
            Command(
                argv=[str(program.python), str(neutral.PROGRAM)],
                env={"PYTHONHASHSEED": "0", **program.environment},
                cwd=Path("/"),
                files=dict(enumerate(logs.values())),
                workload=True,
            )
        )
        facts = _wait(cell, pid, logs["stderr.log"])
        _require_neutral(cell, pid)
        opened = opened_files(cell, [pid]) - set(map(str, logs.values()))
        threads = processes.threads(cell, pid)
        criu.dump(tool, cell, pid, tree / "criu")
        clocks = cell.clocks()
        copy_sparse_tree(cell.root / "dev/shm", tree / "shm")
    dump_bytes = size_bytes(tree / "criu")
    memory = compact(tree, pid)
    variables = facts["variables"]
    assert isinstance(variables, list)
    return structs.replace(
        record,
        process=_process(pid, threads, clocks, logs),
        mapped_files=mapped_files(opened),
        loaded=structs.replace(record.loaded, files=()),
        dump=Dump(
            dump_bytes=dump_bytes,
            stored_bytes=size_bytes(tree / "criu") + sum(each.data_bytes for each in memory),
            files=scan(tree),
            memory=tuple(stored_memory(each) for each in memory),
        ),
        node=structs.replace(record.node, devices=structs.replace(record.node.devices, gpus=())),
        weights={},
        reads="",
        neutral=Neutral(script=str(program.script), variables=tuple(map(str, variables))),
    )


def _process(pid: int, threads: int, clocks: Clocks, logs: Mapping[str, Path]) -> Process:
    return Process(
        root_pid=pid,
        server_pid=pid,
        tasks=threads,
        network=Network.HOST,
        monotonic_ns=clocks.monotonic_ns,
        boottime_ns=clocks.boottime_ns,
        stdout=str(logs["stdout.log"]),
        stderr=str(logs["stderr.log"]),
        stdin=str(logs["stdin"]),
    )


def _program(argv: Sequence[str], environment: Mapping[str, str]) -> _Program:
    """Return the Python script that a command runs. Raises _NotNeutralError if it runs something else."""
    try:
        command = unwrap(argv, environment)
    except UnclearCommand as error:
        raise _NotNeutralError(f"it is unclear what the command runs: {error}") from None
    script = packages.program(command.argv, command.environment)
    python = packages.interpreter(argv, environment)
    if command.wrappers or script is None or python is None:
        raise _NotNeutralError("the command does not run a Python script")
    with open(script, "rb") as file:
        if file.read(2) != b"#!":
            raise _NotNeutralError(f"{script} is not a Python script")
    return _Program(python=python, script=script, environment=command.environment)


def _wait(cell: Cell, pid: int, log: Path) -> dict[str, object]:
    deadline = time.monotonic() + _IMPORT_SECONDS
    while time.monotonic() < deadline:
        if (found := neutral.facts(cell.root)) is not None:
            return dict(found)
        if (status := cell.wait(pid, _POLL_SECONDS)) is not None:
            ended = log.read_text(errors="replace")[-2000:]
            raise DumpError(f"its imports ended with status {exit_status(status)}", cause=ended)
    raise _NotNeutralError(f"its imports took longer than {_IMPORT_SECONDS:.0f} s")


def _require_neutral(cell: Cell, pid: int) -> None:
    """Raise _NotNeutralError unless imports have left nothing that belongs to this node."""
    if others := [each for each in processes.tree(cell, pid) if each != pid]:
        raise _NotNeutralError(f"its imports started {processes.command(cell, others[0])}")
    for path in processes.mapped_paths(cell, pid):
        if path.startswith(_HARDWARE):
            raise _NotNeutralError(f"its imports have mapped {path}")
    for _, target in processes.descriptors(cell, pid):
        if target.startswith("/dev/") and target not in _PLAIN and not target.startswith("/dev/shm/"):  # noqa: S108
            raise _NotNeutralError(f"its imports have opened {target}")
        if target.startswith("socket:"):
            raise _NotNeutralError("its imports have opened a connection")
    available = os.sched_getaffinity(0)
    for thread in processes.task_ids(cell, pid):
        status = (processes.proc(cell) / f"{pid}/task/{thread}/status").read_text()
        listed = next(line.split()[1] for line in status.splitlines() if line.startswith("Cpus_allowed_list"))
        if _cpus(listed) != available:
            raise _NotNeutralError("its imports have bound a thread to CPUs")


def _cpus(text: str) -> set[int]:
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found
