# SPDX-License-Identifier: Apache-2.0
"""Tell what became of a server whose snapshot failed."""

import contextlib
from collections.abc import Iterator

from rekindle.cell import Cell
from rekindle.engine import Engine
from rekindle.engine.client import Client
from rekindle.errors import NotReadyError, RekindleError

_ANSWER_SECONDS = 5.0
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
        raise


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
