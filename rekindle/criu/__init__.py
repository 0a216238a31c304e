# SPDX-License-Identifier: Apache-2.0
"""Call CRIU inside a cell. `search` finds one that works on this OS kernel."""

import contextlib
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rekindle.cell import Cell, Command, MemoryFiles
from rekindle.criu import amx, kernel_facts
from rekindle.errors import DumpError, RekindleError, RestoreError
from rekindle.home import Home
from rekindle.os_errors import full_disk

# Processes that use a GPU take longer to freeze than CRIU's default of ten seconds.
_TIMEOUT_SECONDS = 600
# The largest deleted but open file that is copied into the dump. CRIU's default is 1 MiB.
GHOST_LIMIT_BYTES = 1 << 30
_LEFTOVER_SECONDS = 0.1
# Higher levels cost time: at -v4 a vLLM tree logs 30,000 lines.
_RESTORE_VERBOSITY = "-v1"
_OUTPUT = "criu.out"
# Descriptors of a restoring CRIU.
_AMX_FD, _FIRST_FD = 9, 10

_COMMON = [
    "--tcp-established",  # the processes of a server talk to each other over loopback
    "--ext-unix-sk",  # a datagram socket may be connected to the outside, as /dev/log is
    "--link-remap",  # semaphores and shared memory are unlinked while in use
    "--file-locks",  # compilers lock their caches
    "--manage-cgroups=ignore",  # a restored workload stays in the cgroup of the restoring process
    "--network-lock=skip",  # a private network is unreachable from outside, so nothing can race
]


class Criu(NamedTuple):
    """A CRIU that was tried and works on this OS kernel."""

    path: Path
    version: str


def dump(
    criu: Criu,
    cell: Cell,
    pid: int,
    directory: Path,
    *,
    options: Sequence[str] = (),
    timeout: float = _TIMEOUT_SECONDS,
) -> None:
    """Dump a process of the cell and its descendants into a directory, and kill them.

    Raises DumpError; the processes then keep running, unless CRIU had to be killed. See also `frozen`.
    """
    command = dump_command(criu, pid, directory, timeout, options)
    status = cell.run(command, timeout)
    if status != 0:
        raise failed(
            DumpError("CRIU could not dump the server"), command.argv, directory, "dump.log", status, timeout
        )


def dump_command(
    criu: Criu,
    pid: int,
    directory: Path,
    timeout: float = _TIMEOUT_SECONDS,
    options: Sequence[str] = (),
    *,
    logs: Path | None = None,
) -> Command:
    """Return the command that dumps a process tree of a cell into a directory. `logs` is another for logs."""
    argv = [
        str(criu.path),
        "dump",
        f"--tree={pid}",
        f"--images-dir={directory}",
        "--log-file=dump.log",
        "-v2",
        f"--timeout={int(timeout)}",
        f"--ghost-limit={GHOST_LIMIT_BYTES}",
        "--skip-in-flight",  # a client whose connection was not accepted sees it broken, as after a restart
        *_COMMON,
        *options,
    ]
    return _command(argv, logs or directory, {})


def restore(
    criu: Criu,
    cell: Cell,
    directory: Path,
    *,
    inherit: Mapping[Path, int] | None = None,
    log_directory: Path | None = None,
    home: Home | None = None,
    memory: MemoryFiles | None = None,
    timeout: float = _TIMEOUT_SECONDS,
) -> None:
    """Restore a dump in a cell; its root becomes a child of the cell's init.

    `inherit` maps files that the processes had open to descriptors of ours that replace them. `memory` is the
    location of the memory files that the dump maps. Raises MappingRefused if they cannot be mapped, before
    anything is restored. Raises RestoreError; end the cell then, since some processes may exist already.
    """
    log_directory = log_directory or directory
    fds = {_FIRST_FD + number: fd for number, fd in enumerate((inherit or {}).values())}
    argv = [
        str(criu.path),
        "restore",
        f"--images-dir={directory}",
        f"--work-dir={log_directory}",
        "--log-file=restore.log",
        _RESTORE_VERBOSITY,
        "--restore-detached",
        *_COMMON,
    ]
    for number, path in enumerate(inherit or {}):
        argv += ["--inherit-fd", f"fd[{_FIRST_FD + number}]:{str(path).lstrip('/')}"]
    needed = [directory, log_directory, *([memory.directory] if memory else [])]
    facts = kernel_facts.known(home, criu.path, *needed) if home else None
    env = {}
    with contextlib.ExitStack() as opened:
        if amx.present():
            fds[_AMX_FD] = amx.open_object()
            opened.callback(os.close, fds[_AMX_FD])
            env["LD_PRELOAD"] = f"/proc/self/fd/{_AMX_FD}"
        command = _command(argv, log_directory, env, fds, memory, facts)
        # CRIU gives a process without groups those that it has itself.
        status = cell.run(command._replace(clear_groups=True), timeout)
    if status != 0:
        failure = RestoreError("CRIU could not restore the server")
        raise failed(failure, argv, log_directory, "restore.log", status, timeout)


def _command(
    argv: Sequence[str],
    log_directory: Path,
    env: Mapping[str, str],
    fds: Mapping[int, int] | None = None,
    memory: MemoryFiles | None = None,
    facts: bytes | None = None,
) -> Command:
    output = log_directory / _OUTPUT
    return Command(
        argv=argv,
        env={"PATH": os.environ.get("PATH", os.defpath), **env},
        cwd=Path("/"),
        files={0: Path(os.devnull), 1: output, 2: output},
        fds=fds or {},
        memory=memory,
        criu_facts=facts,
    )


def failed(
    failure: RekindleError,
    argv: Sequence[str],
    log_directory: Path,
    log_name: str,
    status: int | None,
    timeout: float,
) -> RekindleError:
    """Complete the error for a CRIU that failed; `status` is None after a timeout."""
    log = log_directory / log_name
    cause = errors_in(log) or errors_in(log_directory / _OUTPUT, every_line=True)
    if status is None:
        cause = f"timed out after {timeout:.0f} s. {cause}"
    if "No space left on device" in cause:
        return full_disk(log_directory, cause=cause)
    failure.cause, failure.log, failure.command = cause, log, tuple(argv)
    return failure


def remove_leftovers() -> None:
    """Remove the directories that killed CRIUs left in /tmp. Call it after a command of ours was killed.

    Where /run is no tmpfs, CRIU probes the OS kernel at every start, in such a directory, for some
    milliseconds. One that is still there after 0.1 s, and empty, is abandoned.
    """
    found = list(Path("/tmp").glob(".criu.*"))  # noqa: S108 - CRIU's choice
    if found:
        time.sleep(_LEFTOVER_SECONDS)
    for path in found:
        with contextlib.suppress(OSError):
            path.rmdir()


def errors_in(log: Path, *, every_line: bool = False, limit: int = 5) -> str:
    """Return the first error lines of a CRIU log, or its first lines of any kind; "" if it has none."""
    try:
        with open(log, errors="replace") as file:
            # Where CRIU may not raise its rlimits, this harmless complaint comes first and hides the cause.
            lines = [
                line.strip()
                for line in file
                if (every_line or "Error" in line) and "Can't setup RLIMIT_NOFILE for self" not in line
            ]
    except OSError:
        return ""
    return "; ".join(lines[:limit])
