# SPDX-License-Identifier: Apache-2.0
"""Try whether a CRIU works here: dump and restore a small process with threads and a TCP listener.

Where we have a filter of system calls (seccomp), as in most containers, nothing can be dumped: meanwhile,
CRIU suspends the filter of the process (PTRACE_O_SUSPEND_SECCOMP), which the OS kernel allows only to those
without one, and it calls kcmp(2), which containers forbid. A restore needs neither. So there, `trial_dump`
is restored.

    tools/criu-that-fail.json   {IDENTITY: {"version", "problem", "boot", "time"}}, for an hour of this boot
"""

import contextlib
import json
import os
import re
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from rekindle import criu
from rekindle.cell import Cell, Command, Network
from rekindle.criu import Criu, trial_dump
from rekindle.errors import CapabilityError, DumpError, RestoreError
from rekindle.files import write_atomically
from rekindle.home import Home
from rekindle.proc import boot_id, has_capability, has_filter, privileges

_SECONDS = 20.0
_FAILURE_SECONDS = 3600.0
_CAP_SETPCAP = 8
_CAPABILITIES_HINT = "run rekindle with the capabilities that docs/operations.md names"
_PORT = 1234
_PROGRAM = f"""
import socket, threading
for _ in range(3):
    threading.Thread(target=threading.Event().wait, daemon=True).start()
server = socket.create_server(("127.0.0.1", {_PORT}))
asked = 0
while True:
    peer = server.accept()[0]
    asked += 1
    peer.sendall(str(asked).encode())
    peer.close()
"""


class CriuCandidate(NamedTuple):
    """A CRIU that was found and tried. `problem` says why it does not work; "" if it does."""

    path: Path
    version: str
    problem: str


def run(home: Home, path: Path, identity: str) -> CriuCandidate:
    """Try a CRIU. It takes a second, or 20 if it hangs, so a failure is remembered for `identity`."""
    found = _try(home, path)
    failures = _failures(home)
    failures.pop(identity, None)
    if found.problem:
        failures[identity] = {
            "version": found.version,
            "problem": found.problem,
            "boot": boot_id(),
            "time": time.time(),
        }
    with contextlib.suppress(OSError):
        write_atomically(_file(home), json.dumps(failures).encode())
    return found


def known_failure(home: Home, path: Path, identity: str) -> CriuCandidate | None:
    """Return a failure that is remembered for `identity`."""
    known = _failures(home).get(identity)
    if known is None:
        return None
    minutes = max(1, round((time.time() - known["time"]) / 60))
    problem = f"{known['problem']} (tried {minutes} min ago; `rekindle doctor` tries again)"
    return CriuCandidate(path=path, version=str(known["version"]), problem=problem)


def _failures(home: Home) -> dict[str, dict[str, Any]]:
    """Return the failures that still count."""
    with contextlib.suppress(OSError, ValueError, AttributeError, TypeError, KeyError):
        return {
            identity: each
            for identity, each in json.loads(_file(home).read_bytes()).items()
            if each["boot"] == boot_id()
            and 0 <= time.time() - each["time"] < _FAILURE_SECONDS
            and {"version", "problem"} <= each.keys()
        }
    return {}


def _file(home: Home) -> Path:
    return home.tools / "criu-that-fail.json"


def _try(home: Home, path: Path) -> CriuCandidate:
    try:
        version = _version(path)
    except OSError as error:
        return CriuCandidate(path=path, version="unknown", problem=str(error))
    if os.geteuid() != 0:
        raise CapabilityError("CRIU needs root", hint="run rekindle as root (sudo)")
    if not has_capability(_CAP_SETPCAP):  # it would hang
        raise CapabilityError("CRIU needs CAP_SETPCAP", hint=_CAPABILITIES_HINT)
    problem = ""
    try:
        with home.work("probe") as directory:
            tool = Criu(path=path, version=version)
            if has_filter() and trial_dump.available():
                _restore(tool, directory)
            else:
                _dump_and_restore(tool, directory)
    except (DumpError, RestoreError) as error:
        problem = error.summary
    return CriuCandidate(path=path, version=version, problem=problem)


def _version(path: Path) -> str:
    from rekindle.run import run as run_command

    match = re.search(r"Version: (\S+)", run_command([str(path), "--version"], timeout=10).output)
    return match[1] if match else "unknown"


def _restore(tool: Criu, directory: Path) -> None:
    """Restore the dump that we have. Raises RestoreError."""
    found = privileges()
    trial_dump.write(directory, {name: int(found[name], 16) for name in ("CapPrm", "CapEff", "CapBnd")})
    with Cell() as cell:
        cell.enter(Network.PRIVATE)
        path = cell.root / trial_dump.PLACE
        path.write_bytes(trial_dump.program())
        path.chmod(0o755)
        criu.restore(tool, cell, directory, timeout=_SECONDS)
        cell.signal(trial_dump.PID, signal.SIGTERM)
        status = cell.wait(trial_dump.PID, _SECONDS)
        if status != signal.SIGTERM:
            raise RestoreError("the trial process did not run on", cause=f"its wait status is {status}")


def _dump_and_restore(tool: Criu, directory: Path) -> None:
    """Dump and restore a small process. Raises DumpError or RestoreError."""
    log = directory / "log"
    program = Command(
        argv=[sys.executable, "-I", "-S", "-c", _PROGRAM],
        env={},
        cwd=Path("/"),
        files={0: Path(os.devnull), 1: log, 2: log},
        workload=True,
    )
    with Cell() as cell:
        cell.enter(Network.PRIVATE)
        pid = cell.spawn(program)
        _expect(_ask(cell, pid, log), b"1")
        criu.dump(tool, cell, pid, directory, timeout=_SECONDS)
        clocks = cell.clocks()
    with Cell() as cell:
        cell.enter(Network.PRIVATE, clocks)
        criu.restore(tool, cell, directory, timeout=_SECONDS)
        _expect(_ask(cell, pid, log), b"2")


def _ask(cell: Cell, pid: int, log: Path) -> bytes:
    deadline = time.monotonic() + _SECONDS
    while True:
        try:
            with cell.connect("127.0.0.1", _PORT, timeout=1.0) as sock:
                return sock.recv(16, socket.MSG_WAITALL)
        except OSError as error:
            if cell.wait(pid, 0.01) is not None:
                said = log.read_text(errors="replace").strip().splitlines()[-1:]
                raise RestoreError("the trial process ended", cause="".join(said)) from error
            if time.monotonic() > deadline:
                raise RestoreError("the trial process does not answer") from error


def _expect(got: bytes, wanted: bytes) -> None:
    if got != wanted:
        raise RestoreError(f"the trial process answered {got!r} instead of {wanted!r}")
