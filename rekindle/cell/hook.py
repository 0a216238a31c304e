# SPDX-License-Identifier: Apache-2.0
"""Load a hook into the Python processes of a server in a cell, and call it around a snapshot.

    /dev/shm/rekindle/           in the cell, and part of its snapshots
        generation               32 hexadecimal digits, others after each restore, as VMs have VMGenID
        reseed                   what to reseed: a value of Reseed
        request                  what the hooks are asked to do: python_hook.py
        python/                  on PYTHONPATH: sitecustomize.py (python_site.py), rekindle_hook.py

The hook's thread is found by its name, and asked by a signal to that thread alone. docs/adr/0029-reseed.md
compares this with other ways.
"""

import contextlib
import os
import time
from collections.abc import Collection, Mapping
from enum import StrEnum
from pathlib import Path

from rekindle.cell import Cell, processes, python_hook
from rekindle.files import write_atomically

DIRECTORY = Path("/dev/shm/rekindle")  # noqa: S108 - in the cell's private file system
_TOKEN_DIGITS = 6  # a thread's name has 15 characters
_POLL_SECONDS = 0.0005
_START_SECONDS = 5.0
_PAUSE_SECONDS = 0.02


class Reseed(StrEnum):
    """The scope of reseeding: nothing, what the program has not seeded itself, or all."""

    NONE = "none"
    UNSEEDED = "unseeded"
    ALL = "all"


class HookPhase(StrEnum):
    """The requests to a hook."""

    BEFORE_SNAPSHOT = "before-snapshot"
    SHUT_DOWN_NVML = "shut-down-nvml"
    AFTER_RESTORE = "after-restore"


def renew_generation(root: Path) -> None:
    """Write a new generation into the file system of a cell."""
    directory = root / DIRECTORY.relative_to("/")
    directory.mkdir(mode=0o755, exist_ok=True)
    _write(directory / "generation", os.urandom(16).hex())


def install(root: Path, reseed: Reseed) -> None:
    """Put the hook into the file system of a cell, for the processes that `environment` reaches.

    With Reseed.NONE it leaves random numbers alone.
    """
    directory = root / DIRECTORY.relative_to("/")
    python = directory / "python"
    python.mkdir(mode=0o755)
    _write(directory / "reseed", reseed)
    _write(directory / "request", f"start {_token()}")
    here = Path(python_hook.__file__)
    _write(python / "rekindle_hook.py", here.read_text())
    _write(python / "sitecustomize.py", here.with_name("python_site.py").read_text())


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of a server with those that load the hook. They are not recorded."""
    ours, given = str(DIRECTORY / "python"), variables.get("PYTHONPATH")
    return {**variables, "PYTHONPATH": f"{ours}:{given}" if given else ours}


def call(cell: Cell, phase: HookPhase, timeout: float, *, expected: Collection[int] = ()) -> list[int]:
    """Ask the hooks of all processes of a cell and wait for them; return the PIDs that have one.

    Processes that are forked meanwhile answer, too. Raises HookError for a process whose hook fails or does
    not answer within `timeout` seconds, and for one of `expected` that runs without a hook.
    """
    token = _token()
    _write(cell.root / DIRECTORY.relative_to("/") / "request", f"{phase} {token}")
    asked: set[int] = set()
    deadline = time.monotonic() + timeout
    while True:
        found = _hooks(cell)
        pending = [pid for pid, threads in found.items() if f"rekindle {token}" not in threads.values()]
        for pid in pending:
            if f"rekindle!{token}" in found[pid].values():
                raise HookError(pid, "it raised an exception: see the output of the server")
            for thread in found[pid].keys() - asked:
                asked.add(thread)
                cell.signal(pid, python_hook.SIGNAL, thread=thread)
        pending += set(expected) & set(processes.pids(cell)) - found.keys()
        if not pending:
            return sorted(found)
        if time.monotonic() > deadline:
            raise HookError(min(pending), f"it did not answer within {timeout:.0f} s")
        time.sleep(_POLL_SECONDS)


class HookError(Exception):
    """The hook of a process failed, or did not answer in time."""

    def __init__(self, pid: int, problem: str) -> None:
        super().__init__(problem)
        self.pid, self.problem = pid, problem


def without_hook(cell: Cell, root: int) -> list[int]:
    """Return the Python processes below `root` that have no hook, after a while for those that just start."""
    deadline = time.monotonic() + _START_SECONDS
    while True:
        hooks = _hooks(cell)
        found = [pid for pid in processes.tree(cell, root) if pid not in hooks and _is_python(cell, pid)]
        if not any(_will_load(cell, pid) for pid in found) or time.monotonic() > deadline:
            return found
        time.sleep(_PAUSE_SECONDS)


def _is_python(cell: Cell, pid: int) -> bool:
    names = [Path(path).name for path in processes.mapped_paths(cell, pid)]
    return any(name.startswith(("python", "libpython")) for name in names)


def _will_load(cell: Cell, pid: int) -> bool:
    with contextlib.suppress(OSError):
        return bytes(DIRECTORY) in (processes.proc(cell) / f"{pid}/environ").read_bytes()
    return False


def _hooks(cell: Cell) -> dict[int, dict[int, str]]:
    """Return the names of the threads that are called as the hook's is, by their IDs, by process.

    A process can have several: threads and children that a callback starts inherit the name.
    """
    found: dict[int, dict[int, str]] = {}
    for pid in processes.pids(cell):
        for thread in processes.task_ids(cell, pid):
            with contextlib.suppress(OSError):
                name = (processes.proc(cell) / f"{pid}/task/{thread}/comm").read_text().rstrip("\n")
                if name.startswith(("rekindle ", "rekindle!")):
                    found.setdefault(pid, {})[thread] = name
    return found


def _token() -> str:
    return os.urandom(_TOKEN_DIGITS // 2).hex()


def _write(path: Path, text: str) -> None:
    write_atomically(path, f"{text}\n".encode())
    path.chmod(0o644)
