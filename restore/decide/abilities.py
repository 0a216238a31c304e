# SPDX-License-Identifier: Apache-2.0
"""Probe whether a node can restore a process. Results are remembered until what they depend on changes."""

import contextlib
import json
import os
from collections.abc import Mapping

from msgspec import Struct, field

from rekindle.cell import Cell, Clocks, Network
from rekindle.criu import Criu, search
from rekindle.errors import CapabilityError, RekindleError
from rekindle.files import write_atomically
from rekindle.home import Home
from rekindle.node import memory
from rekindle.proc import privileges


class Abilities(Struct, frozen=True, kw_only=True):
    """A working CRIU, or None, and what prevents a restore of a process here, by reason code.

    `memory_bytes` is the memory available here; None if it is unknown.
    """

    criu: Criu | None = None
    memory_bytes: int | None = None
    problems: Mapping[str, str] = field(default_factory=dict)


def probe(home: Home) -> Abilities:
    """Try what restoring a process needs.

    Takes tens of milliseconds the first time, a second if CRIU has to be tried, and next to nothing later.
    """
    if os.geteuid() != 0:
        return Abilities(problems={"privileges": f"running as user {os.geteuid()}, not as root"})
    if problem := _cell_problem(home):
        return Abilities(problems={"privileges": problem})
    try:
        return Abilities(criu=search.find(home), memory_bytes=memory.available_bytes())
    except CapabilityError as error:
        problem = error.summary
        return Abilities(problems={"criu": problem})


def cuda_problem(home: Home) -> str:
    """Return what prevents restoring CUDA state here, or "".

    Does not start the driver, which takes seconds, and so may miss a problem.
    """
    from rekindle.cuda.search import problem

    return problem(home)


def _cell_problem(home: Home) -> str:
    """Return why no cell can be made here, or ""."""
    known = home.tools / "cells-that-work.json"
    identity = privileges()
    with contextlib.suppress(OSError, ValueError):
        if json.loads(known.read_bytes()) == identity:
            return ""
    try:
        with Cell() as cell:
            cell.enter(Network.PRIVATE, Clocks.now())
    except RekindleError as error:
        return error.cause or error.message
    with contextlib.suppress(OSError):
        write_atomically(known, json.dumps(identity).encode())
    return ""
