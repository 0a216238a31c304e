# SPDX-License-Identifier: Apache-2.0
"""What a node can do for a process that is to be restored: tried, and remembered until its cause changes."""

import contextlib
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rekindle import criu
from rekindle.cell import Cell, Clocks, Network
from rekindle.criu import Criu
from rekindle.errors import CapabilityError, RekindleError
from rekindle.files import write_atomically
from rekindle.home import Home
from rekindle.proc import boot_id


@dataclass(frozen=True, slots=True, kw_only=True)
class Abilities:
    """A CRIU that works, if there is one, and by reason code why a process cannot be restored here."""

    criu: Criu | None = None
    lacks: Mapping[str, str] = field(default_factory=dict)


def probe(home: Home) -> Abilities:
    """Tries what a restore of a process needs. Tens of milliseconds the first time, a second if CRIU is to
    be tried, too; then next to none."""
    if os.geteuid() != 0:
        return Abilities(lacks={"privileges": f"this is user {os.geteuid()}, and not root"})
    if lack := _cell_lack(home):
        return Abilities(lacks={"privileges": lack})
    try:
        return Abilities(criu=criu.find(home))
    except CapabilityError as error:
        return Abilities(lacks={"criu": f"{error.message}: {error.cause}" if error.cause else error.message})


def cuda_lack(home: Home) -> str:
    """Why what a process held on NVIDIA GPUs cannot be restored here, as far as it shows without starting the
    driver, which takes seconds; empty if nothing does. For a record that names such GPUs."""
    from rekindle.cuda import search

    return search.problem(home)


def _cell_lack(home: Home) -> str:
    """Why no cell can be made here; empty if one can."""
    known = home.tools / "cells-that-work.json"
    identity = _privileges()
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


def _privileges() -> dict[str, str]:
    """What decides whether we may make namespaces and mounts."""
    found = {"kernel": platform.release(), "boot": boot_id()}
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in {"CapEff", "CapBnd", "Seccomp", "NoNewPrivs"}:
            found[name] = value.strip()
    for name in ("user", "pid", "cgroup"):
        found[name] = str(Path(f"/proc/self/ns/{name}").readlink())
    with contextlib.suppress(OSError):
        found["label"] = Path("/proc/self/attr/current").read_text().strip("\0\n")
    return found
