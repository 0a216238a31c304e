# SPDX-License-Identifier: Apache-2.0
"""A server that was started in a cell, so that it can be snapshotted."""

import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rekindle.cell import Cell, Command, exit_status, processes
from rekindle.errors import UsageError, WorkloadError

# A shell stands above the server as the tree's root. CRIU restores the memory of a tree's root only
# after that of all others; with a root that has none, the server's own is restored beside theirs.
_ROOT = ["/bin/sh", "-c", '"$@"; exit $?', "sh"]
TEMPORARY = Path("/dev/shm/tmp")  # noqa: S108 - in the cell's private file system, and kept in the snapshot
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_LAST_WORDS_BYTES = 4000
_SPAWN_SECONDS = 10.0


class Server:
    """The running server. `root_pid` and `server_pid` are PIDs in the cell."""

    def __init__(
        self,
        cell: Cell,
        argv: Sequence[str],
        environment: Mapping[str, str],
        cwd: Path,
        logs: Path,
    ) -> None:
        """Starts it. Its output goes to `stdout.log` and `stderr.log` in `logs`."""
        from shutil import which

        if which(argv[0], path=environment.get("PATH")) is None:
            raise UsageError(f"there is no command {argv[0]}", hint="is its environment on PATH?")
        self.cell = cell
        self.stdout = logs / "stdout.log"
        self.stderr = logs / "stderr.log"
        self.added = {
            "PYTHONHASHSEED": "0",  # with equal layouts, dumps of equal servers share most pages
            "TMPDIR": str(TEMPORARY),  # sockets and files there are the cell's own, and come along
        }
        self.environment = {**environment, **self.added}
        make_temporary(cell)
        self.root_pid = cell.spawn(
            Command(
                argv=[*_ROOT, *_odd_variables(self.environment), *argv],
                env=self.environment,
                cwd=cwd,
                files={0: Path(os.devnull), 1: self.stdout, 2: self.stderr},
                workload=True,
            )
        )

    @property
    def server_pid(self) -> int:
        """The process of the command itself."""
        deadline = time.monotonic() + _SPAWN_SECONDS
        while True:
            if found := processes.children(self.cell, self.root_pid):
                return found[0]
            self.raise_if_dead(0.01)
            if time.monotonic() > deadline:
                raise WorkloadError("the server did not start", log=self.stderr)

    def raise_if_dead(self, timeout: float) -> None:
        """Waits for the server's end for some time; raises WorkloadError if it comes."""
        status = self.cell.wait(self.root_pid, timeout)
        if status is not None:
            raise WorkloadError(
                f"the server ended with status {exit_status(status)}",
                cause=self.last_words(),
                hint="does the same command run without rekindle?",
                log=self.stderr,
            )

    def last_words(self) -> str:
        """The end of what it wrote."""
        ends = []
        for path in (self.stdout, self.stderr):
            try:
                with open(path, "rb") as file:
                    file.seek(max(0, path.stat().st_size - _LAST_WORDS_BYTES))
                    ends.append(file.read().decode(errors="replace").strip())
            except OSError:
                continue
        return "\n".join(end for end in ends if end)[-_LAST_WORDS_BYTES:]


def make_temporary(cell: Cell) -> Path:
    """Makes the server's TMPDIR, open to all its users; returns it as the host sees it. Idempotent."""
    inside = cell.root / TEMPORARY.relative_to("/")
    inside.mkdir(exist_ok=True)
    inside.chmod(0o1777)
    return inside


def _odd_variables(environment: Mapping[str, str]) -> list[str]:
    """A command that sets the variables which a shell does not pass on: those whose name is no identifier."""
    odd = [f"{name}={value}" for name, value in environment.items() if not _IDENTIFIER.fullmatch(name)]
    return ["env", *odd] if odd else []
