# SPDX-License-Identifier: Apache-2.0
"""Run the server to snapshot in a cell."""

import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from rekindle.cell import Cell, Command, exit_status, hook, processes
from rekindle.cell.relay import SIGNALS
from rekindle.environment import FILE_KEY_VARIABLE, file_key
from rekindle.errors import UsageError, WorkloadError
from rekindle.proc import children

# A shell is the root of the process tree, above the server. CRIU restores the memory of the root after that
# of all others: with a root that has next to none, the server's memory is restored in parallel with theirs.
# It outlives signals to a whole control group, since the server may drain first. The server does not inherit
# traps, as it would ignored signals, nor the key that its memory keeps with the snapshot.
_TRAPPED = " ".join(sorted(signum.name.removeprefix("SIG") for signum in SIGNALS))
_ROOT = ["/bin/sh", "-c", f'unset {FILE_KEY_VARIABLE}; trap : {_TRAPPED}; "$@"; exit $?', "sh"]
TEMPORARY = Path("/dev/shm/tmp")  # noqa: S108 - in the cell's private file system, and kept in the snapshot
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_LOG_TAIL_BYTES = 4000
_SPAWN_SECONDS = 10.0
_KEY_BYTES = 32


class Server:
    """The running server. `root_pid` and `server_pid` are PIDs in the cell.

    `file_key` is the key to the digests of secret files; b"" if the server was started without one.
    """

    def __init__(
        self,
        cell: Cell,
        argv: Sequence[str],
        environment: Mapping[str, str],
        cwd: Path,
        logs: Path,
        reseed: hook.Reseed = hook.Reseed.NONE,
        *,
        gpus: bool = False,
    ) -> None:
        """Start the server. Its output goes to `stdout.log` and `stderr.log` in the directory `logs`.

        With `gpus`, its Python processes get the hook also if nothing is to be reseeded: it lets go of NVML.

        Raises UsageError if the command is not found.
        """
        from shutil import which

        if which(argv[0], path=environment.get("PATH")) is None:
            raise UsageError(f"command not found: {argv[0]}", hint="is its virtual environment on PATH?")
        self.cell, self.reseed = cell, reseed
        self.stdout = logs / "stdout.log"
        self.stderr = logs / "stderr.log"
        self.environment = {
            "PYTHONHASHSEED": "0",  # equal memory layouts: dumps of equal servers share most pages
            **environment,
            "TMPDIR": str(TEMPORARY),  # private to the cell, and part of the snapshot
        }
        make_temporary(cell)
        hook.renew_generation(cell.root)
        started_with = self.environment
        if gpus or reseed is not hook.Reseed.NONE:
            hook.install(cell.root, reseed)
            started_with = hook.environment(self.environment)
        self.file_key = os.urandom(_KEY_BYTES)
        self.root_pid = cell.spawn(
            Command(
                argv=[*_ROOT, *_env_command(self.environment), *argv],
                env={**started_with, FILE_KEY_VARIABLE: self.file_key.hex()},
                cwd=cwd,
                files={0: Path(os.devnull), 1: self.stdout, 2: self.stderr},
                workload=True,
            )
        )

    @classmethod
    def running(
        cls,
        cell: Cell,
        root_pid: int,
        environment: Mapping[str, str],
        stdout: Path,
        stderr: Path,
        reseed: hook.Reseed = hook.Reseed.NONE,
    ) -> Self:
        """Return a server that was started already, by its PID in the cell and what it was started with."""
        server = cls.__new__(cls)
        server.cell, server.root_pid, server.environment = cell, root_pid, dict(environment)
        server.stdout, server.stderr, server.reseed = stdout, stderr, reseed
        server.file_key = file_key(processes.environment(cell, root_pid))
        return server

    @property
    def server_pid(self) -> int:
        """The PID of the command itself, below the shell. Raises WorkloadError if it does not start."""
        deadline = time.monotonic() + _SPAWN_SECONDS
        while True:
            if found := children(processes.proc(self.cell) / str(self.root_pid)):
                return found[0]
            self.raise_if_dead(0.01)
            if time.monotonic() > deadline:
                raise WorkloadError("the server did not start", log=self.log)

    def raise_if_dead(self, timeout: float) -> None:
        """Wait up to `timeout` seconds for the server's exit; raise WorkloadError if it has exited."""
        status = self.cell.wait(self.root_pid, timeout)
        if status is not None:
            raise WorkloadError(
                f"the server exited with status {exit_status(status)}",
                cause=self.log_tail(),
                hint="does the same command run without rekindle?",
                log=self.log,
            )

    @property
    def log(self) -> Path:
        """The log that was written last: servers differ in where they write a traceback."""

        def written(path: Path) -> tuple[bool, int]:
            try:
                status = path.stat()
            except OSError:
                return False, 0
            return status.st_size > 0, status.st_mtime_ns

        return max((self.stderr, self.stdout), key=written)

    def log_tail(self) -> str:
        """Return the end of the server's output."""
        ends = []
        for path in (self.stdout, self.stderr):
            try:
                with open(path, "rb") as file:
                    file.seek(max(0, path.stat().st_size - _LOG_TAIL_BYTES))
                    ends.append(file.read().decode(errors="replace").strip())
            except OSError:
                continue
        return "\n".join(end for end in ends if end)[-_LOG_TAIL_BYTES:]


def make_temporary(cell: Cell) -> Path:
    """Make the server's TMPDIR, writable by all users; return its path on the host. Idempotent."""
    inside = cell.root / TEMPORARY.relative_to("/")
    inside.mkdir(exist_ok=True)
    inside.chmod(0o1777)
    return inside


def _env_command(environment: Mapping[str, str]) -> list[str]:
    """Return an `env` command with the variables that a shell does not pass on; empty if there are none.

    These are the variables whose names are not identifiers.
    """
    odd = [f"{name}={value}" for name, value in environment.items() if not _IDENTIFIER.fullmatch(name)]
    return ["env", *odd] if odd else []
