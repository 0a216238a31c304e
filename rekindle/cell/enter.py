# SPDX-License-Identifier: Apache-2.0
"""Run a command in a cell that another process holds, for a look inside."""

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from rekindle.errors import CapabilityError, Interrupted, NotFoundError

_NAMESPACES = ("time", "ipc", "net", "pid", "mnt")  # the last hides the host's /proc
_NOT_FOUND_STATUS, _NOT_EXECUTABLE_STATUS = 127, 126


def run_in(init: int, argv: Sequence[str], directory: Path) -> int:
    """Run a command in the namespaces of a cell, and return its exit status as a shell does.

    `init` is a pidfd of the cell's init. The command has our standard files and environment, and starts in
    `directory`. Call this in a process with a single thread; it stays in the cell. Raises NotFoundError if
    the cell has ended, CapabilityError.
    """
    namespaces = _open_namespaces(init)
    libc = ctypes.CDLL(None, use_errno=True)
    for name, fd in zip(_NAMESPACES, namespaces, strict=True):
        if libc.setns(fd, 0) == -1:
            number = ctypes.get_errno()
            raise CapabilityError(
                "cannot enter the cell",
                cause=f"setns({name}): {os.strerror(number)}",
                hint="run as root (CAP_SYS_ADMIN)",
            )
        os.close(fd)
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        _execute(argv, directory)
    return _wait(pid)


def _open_namespaces(init: int) -> list[int]:
    """Open the namespaces of a process given by a pidfd."""
    with open(f"/proc/self/fdinfo/{init}") as file:
        pid = next(int(line.split()[1]) for line in file if line.startswith("Pid:"))
    with contextlib.ExitStack() as stack:
        fds = []
        try:
            for name in _NAMESPACES:
                fds.append(os.open(f"/proc/{pid}/ns/{name}", os.O_RDONLY | os.O_CLOEXEC))
                stack.callback(os.close, fds[-1])
            signal.pidfd_send_signal(init, 0)  # it is alive, so they were its own
        except (FileNotFoundError, ProcessLookupError):
            raise NotFoundError("the cell has ended") from None
        except PermissionError as error:
            raise CapabilityError("cannot enter the cell", cause=str(error), hint="run as root") from None
        stack.pop_all()
        return fds


def _execute(argv: Sequence[str], directory: Path) -> NoReturn:
    status = _NOT_EXECUTABLE_STATUS
    try:
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(signum, signal.SIG_DFL)
        os.chdir(directory if directory.is_dir() else "/")
        os.execvp(argv[0], list(argv))  # noqa: S606 - an argument list
    except OSError as error:
        status = _NOT_FOUND_STATUS if isinstance(error, FileNotFoundError) else status
        os.write(2, f"rekindle: error: cannot run {argv[0]}: {error.strerror}\n".encode())
    finally:
        os._exit(status)


def _wait(pid: int) -> int:
    """Wait for the command. A terminal sends its signals to the command, too; pass on the others."""
    before = [(signum, signal.signal(signum, signal.SIG_IGN)) for signum in (signal.SIGINT, signal.SIGQUIT)]
    try:
        while True:
            try:
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                return code if code >= 0 else 128 - code
            except Interrupted as interrupted:
                os.kill(pid, interrupted.signum)
    finally:
        for signum, handler in before:
            signal.signal(signum, handler)
