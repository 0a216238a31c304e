# SPDX-License-Identifier: Apache-2.0
"""Run external commands. No other module imports `subprocess`.

Commands are argument lists. They read nothing (but for `ask`), write to files (since a surviving child would
hold a pipe open) and always have a timeout. Their children end with them: TERM, then KILL, goes to the
process group.
"""

import contextlib
import os
import shlex
import signal
import subprocess
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rekindle.files import write_at

TimeoutExpired = subprocess.TimeoutExpired
_GRACE_SECONDS = 5.0
_OUTPUT_BYTES = 64 * 1024
_PR_SET_PDEATHSIG = 1


class Completed(NamedTuple):
    """The result of a command. `status` is as in a shell: 128 + n for signal n, 124 for a timeout."""

    argv: tuple[str, ...]
    status: int
    output: str
    peak_rss_bytes: int


def replay(argv: Sequence[str]) -> str:
    """Return a command as one would type it into a shell."""
    return shlex.join(argv)


def run(
    argv: Sequence[str],
    *,
    timeout: float,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    stdout: Path | None = None,
) -> Completed:
    """Run a command, wait for it, and return its result, whatever its status.

    `output` is the last 64 KiB of its standard error, and of its standard output unless that goes to the
    file `stdout`. Kills it after `timeout` seconds. Raises FileNotFoundError if there is no such program.
    """
    import tempfile

    with contextlib.ExitStack() as stack:
        messages = stack.enter_context(tempfile.TemporaryFile())
        out = stack.enter_context(open(stdout, "wb")) if stdout else messages
        process = spawn(argv, env=env, cwd=cwd, stdout=out.fileno(), stderr=messages.fileno())
        status, peak = _finish(process, timeout)
        messages.seek(max(0, messages.seek(0, os.SEEK_END) - _OUTPUT_BYTES))
        output = messages.read().decode(errors="replace")
    return Completed(argv=tuple(argv), status=status, output=output, peak_rss_bytes=peak)


def ask(argv: Sequence[str], content: bytes, *, timeout: float) -> tuple[int, bytes]:
    """Run a command that reads something secret and answers; return its status, as in a shell, and answer.

    The answer is the first 64 KiB of its standard output; its standard error goes to ours. Neither the
    content nor the answer touches a disk. Kills it after `timeout` seconds. Raises OSError if it cannot be
    started.
    """
    given, out = os.memfd_create("input"), os.memfd_create("output")
    try:
        write_at(given, memoryview(content), 0)
        process = spawn(argv, stdin=given, stdout=out, stderr=2)
        status, _ = _finish(process, timeout)
        return status, os.pread(out, _OUTPUT_BYTES, 0)
    finally:
        os.close(given)
        os.close(out)


def spawn(
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    stdin: int = subprocess.DEVNULL,
    stdout: int = subprocess.DEVNULL,
    stderr: int = subprocess.DEVNULL,
    pass_fds: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """Start a command in its own session, so that a terminal's signals do not reach it."""
    return subprocess.Popen(
        list(argv),
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        env=None if env is None else dict(env),
        cwd=cwd,
        pass_fds=tuple(pass_fds),
        start_new_session=True,
    )


def start_server(
    argv: Sequence[str],
    *,
    env: Mapping[str, str],
    cwd: Path,
    stdout: int,
    stderr: int,
) -> subprocess.Popen[bytes]:
    """Start a server in our place: with our standard input, and in its own session.

    It gets SIGTERM when the calling thread ends. Raises OSError if it cannot be started.
    """
    import ctypes

    libc, parent = ctypes.CDLL(None), os.getpid()

    def die_with_parent() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)

    with warnings.catch_warnings():
        # Python 3.12 warns of every function that runs after a fork in a process with threads. This one takes
        # no lock that another thread could hold.
        warnings.simplefilter("ignore", DeprecationWarning)
        return subprocess.Popen(
            list(argv),
            stdout=stdout,
            stderr=stderr,
            env=dict(env),
            cwd=cwd,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a spawned command and its whole process group: TERM, then KILL. The leader is reaped last."""
    for signum, grace in ((signal.SIGTERM, _GRACE_SECONDS), (signal.SIGKILL, _GRACE_SECONDS)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signum)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace)
            break
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _finish(process: subprocess.Popen[bytes], timeout: float) -> tuple[int, int]:
    """Wait for a process; end its group if that takes longer (status 124) or is interrupted."""
    try:
        status, peak = _wait(process, timeout)
    except BaseException:
        end_group(process)
        raise
    if status is None:
        end_group(process)
        status = 124
    return status, peak


def _wait(process: subprocess.Popen[bytes], timeout: float) -> tuple[int | None, int]:
    """Wait for a process; return its status and peak resident memory, or (None, 0) after a timeout."""
    deadline = time.monotonic() + timeout
    pause = 0.001
    while True:
        pid, raw, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            code = os.waitstatus_to_exitcode(raw)
            process.returncode = code
            return (code if code >= 0 else 128 - code), usage.ru_maxrss * 1024
        if time.monotonic() >= deadline:
            return None, 0
        time.sleep(pause)
        pause = min(pause * 2, 0.05)
