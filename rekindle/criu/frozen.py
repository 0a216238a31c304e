# SPDX-License-Identifier: Apache-2.0
"""Dump processes and decide afterwards whether they end.

CRIU calls an action script once the dump is complete, while the processes are still frozen (criu(8),
--action-script, `post-dump`). The script waits for our decision: with status 0, CRIU kills the processes;
with any other it lets them run on as if nothing had happened. Sockets, mappings and files are then as before.
"""

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from rekindle.cell import MEMORY_PLACE, Cell, processes
from rekindle.criu import Criu, dump_command, failed
from rekindle.errors import DumpError
from rekindle.proc import children

_ROLL_BACK_SECONDS = 60.0
_PLACE = MEMORY_PLACE.parent  # in the cell's own /dev/shm, which allows execution
_ALONE = "alone"
_SCRIPT, _FROZEN, _DECISION = "script", "frozen", "decision"  # the last two are pipes
_TEXT = f"""#!/bin/sh
[ "$CRTOOLS_SCRIPT_ACTION" = post-dump ] || exit 0
echo >{_PLACE}/{_FROZEN}
read -r word <{_PLACE}/{_DECISION}
[ "$word" = end ]
"""


# For processes that have nobody who would take them back: it waits only while we live, and they never end.
_TEXT_ALONE = """#!/bin/sh
[ "$CRTOOLS_SCRIPT_ACTION" = post-dump ] || exit 0
echo 1<>{place}/{frozen}
while [ -d /proc/{pid} ] && [ -p {place}/{frozen} ] && [ ! -e {place}/{alone} ]; do sleep 0.01; done
exit 1
"""


class FrozenDump:
    """A complete dump in `directory`; its processes are frozen within the context. CRIU's log is in `logs`.

    When the context is left, they end if `end` was called, and else run on, also after an exception. If CRIU
    is killed meanwhile, their state is unknown: they are killed, too, unless they are not in a cell of ours:
    then they are left alone whatever happens, and cannot be ended.

    Entering the context raises DumpError if CRIU fails; the processes then run on.
    """

    def __init__(
        self,
        tool: Criu,
        cell: Cell,
        root_pid: int,
        directory: Path,
        *,
        logs: Path,
        external: Sequence[str] = (),
        options: Sequence[str] = (),
        timeout: float = 600.0,
    ) -> None:
        self._tool, self._cell, self._root_pid = tool, cell, root_pid
        self._directory, self._logs, self._external, self._timeout = directory, logs, external, timeout
        self._options = options
        self._is_ours = cell.only is None
        self._place = _PLACE if self._is_ours else logs
        self._ends = False
        self._criu = 0
        self._fifos: dict[str, int] = {}
        self._error: BaseException | None = None
        self._worker = threading.Thread(target=self._dump, daemon=True)
        self._stack = contextlib.ExitStack()

    def end(self) -> None:
        """Let the processes end when the context is left."""
        self._ends = True

    def __enter__(self) -> Self:
        with self._stack:
            place = self._cell.root / self._place.relative_to("/")
            place.mkdir(mode=0o700, exist_ok=True)
            script = place / _SCRIPT
            alone = _TEXT_ALONE.format(place=self._place, frozen=_FROZEN, alone=_ALONE, pid=os.getpid())
            script.write_text(_TEXT if self._is_ours else alone)
            self._stack.callback(_remove, script)
            script.chmod(0o700)
            for name in (_FROZEN, _DECISION):
                self._fifos[name] = self._fifo(place / name)
            self._stack.push(lambda _kind, error, _trace: self._finish(error))
            # In a thread: an exception that a signal handler raises here must not lose sight of CRIU.
            self._worker.start()
            self._worker.join()
            if self._error is not None:
                raise self._error
            self._stack = self._stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._ends = False
        self._stack.__exit__(kind, error, trace)

    def _fifo(self, path: Path) -> int:
        _remove(path)  # of a dump whose maker was killed
        os.mkfifo(path, 0o600)
        self._stack.callback(_remove, path)
        fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        self._stack.callback(os.close, fd)
        return fd

    def _dump(self) -> None:
        """Start CRIU, and wait until the dump is complete or CRIU has exited."""
        options = [f"--action-script={self._place}/{_SCRIPT}", f"--work-dir={self._logs}", *self._options]
        options += [f"--external={name}" for name in self._external]
        command = dump_command(
            self._tool, self._root_pid, self._directory, self._timeout, options, logs=self._logs
        )
        try:
            self._criu = self._cell.spawn(command)
            if not self._await_frozen():
                status = self._cell.wait(self._criu, 0.0)
                failure = DumpError("CRIU could not dump the server")
                self._error = failed(failure, command.argv, self._logs, "dump.log", status, self._timeout)
        except BaseException as error:  # raised again where the context is entered
            self._error = error

    def _await_frozen(self) -> bool:
        """Wait until the dump is complete; return False if CRIU has exited or takes too long."""
        deadline = time.monotonic() + self._timeout
        while (left := deadline - time.monotonic()) > 0:
            ready, _, _ = select.select([self._fifos[_FROZEN], self._cell.fileno()], [], [], left)
            if self._fifos[_FROZEN] in ready:
                return True
            if self._cell.fileno() in ready and self._cell.wait(self._criu, 0.0) is not None:
                return False
        return False

    def _finish(self, error: BaseException | None) -> None:
        """Tell CRIU what to do, and wait until it has done it."""
        os.write(self._fifos[_DECISION], b"end\n" if self._ends else b"run\n")
        if not self._is_ours:
            (self._place / _ALONE).touch()
        if self._worker.ident is not None:
            self._worker.join()
        if not self._criu:
            return
        status = self._cell.wait(self._criu, _ROLL_BACK_SECONDS)
        if status is not None and os.WIFEXITED(status) and (self._ends is (status == 0)):
            return
        if not self._is_ours:
            if error is None:
                raise DumpError(
                    "CRIU ended unexpectedly during a dump, and has perhaps not let the server run on",
                    cause=f"its wait status is {status}",
                    log=self._logs / "dump.log",
                )
            return
        if status is None:
            self._cell.signal(self._criu, signal.SIGKILL)
        for pid in processes.host_pids(self._cell):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if error is None:
            raise DumpError(
                "CRIU ended unexpectedly during a dump, so the server was ended, too",
                cause=f"its wait status is {status}",
                log=self._logs / "dump.log",
            )


@contextlib.contextmanager
def letting_run(cell: Cell) -> Iterator[None]:
    """Within the context, decide for a maker of a dump who was killed: the processes run on.

    The script would otherwise wait for somebody at the other ends of its pipes.
    """
    with contextlib.ExitStack() as stack:
        for name in (_FROZEN, _DECISION):
            path = cell.root / _PLACE.relative_to("/") / name
            with contextlib.suppress(OSError):  # it has not come so far
                fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
                stack.callback(os.close, fd)
                if name == _DECISION:
                    os.write(fd, b"run\n")
        yield


def is_dumping(cell: Cell) -> bool:
    """Return whether CRIU works in a cell, or is about to start."""
    proc = processes.proc(cell)
    for pid in children(proc / "1"):
        with contextlib.suppress(OSError):
            words = (proc / str(pid) / "cmdline").read_bytes()
            # Until it runs another program, a child of init has its command line.
            if b"--images-dir=" in words or words == (proc / "1" / "cmdline").read_bytes():
                return True
    return False


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):  # the cell has ended
        path.unlink()
