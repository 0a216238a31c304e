# SPDX-License-Identifier: Apache-2.0
"""Tell what became of a server whose snapshot failed, and name what CRIU could not dump."""

import contextlib
import re
from collections.abc import Iterator

from rekindle.cell import Cell, processes
from rekindle.engine import Engine
from rekindle.engine.client import Client
from rekindle.errors import DumpError, NotReadyError, RekindleError

_ANSWER_SECONDS = 5.0
# "Can't dump file 13 of that type [600] (anon anon_inode:[fscontext]); … Dump files (pid: 1002) failed"
_OF_THAT_TYPE = re.compile(r"Can't dump file (?P<fd>\d+) of that type \[\d+\] \((?P<kind>[^)]*)\)")
_OF_PROCESS = re.compile(r"Dump files \(pid: (?P<pid>\d+)\) failed")
_END_SECONDS = 0.5  # until we hear of a process that was killed just now


@contextlib.contextmanager
def telling_server(cell: Cell, root_pid: int, engine: Engine, *, ends: bool) -> Iterator[None]:
    """Add to an error that leaves the context whether the server still answers.

    `ends`: it will be ended now, since it was started for the snapshot.
    """
    try:
        yield
    except RekindleError as error:
        error.server = error.server or _state(cell, root_pid, engine, ends=ends)
        if isinstance(error, DumpError) and (named := _unknown_descriptor(cell, error.cause)):
            error.cause = f"{named}\n{error.cause}"
        raise


def _unknown_descriptor(cell: Cell, cause: str) -> str:
    """Name the descriptor of which CRIU says that it cannot dump "that type"; "" if it says no such thing.

    What the check before a dump does not know is left to CRIU, which may have learned it.
    """
    fd, process = _OF_THAT_TYPE.search(cause), _OF_PROCESS.search(cause)
    if not fd or not process:
        return ""
    pid = int(process["pid"])
    target = dict(processes.descriptors(cell, pid)).get(int(fd["fd"]), fd["kind"])
    where = f"process {pid} ({processes.command(cell, pid)}), descriptor {fd['fd']} ({target})"
    return f"{where}: is unknown to CRIU; close it before the snapshot"


def _state(cell: Cell, root_pid: int, engine: Engine, *, ends: bool) -> str:
    if cell.wait(root_pid, _END_SECONDS) is not None:
        return "it has ended"
    try:
        answers = engine.ready(Client(engine.endpoint, cell.connect), _ANSWER_SECONDS)
    except (OSError, NotReadyError):
        answers = False
    if ends:
        how = "still answered" if answers else "ran on without answering"
        return f"it {how}, and was ended, since this command had started it"
    return "it serves on" if answers else "it runs on, but does not answer"
