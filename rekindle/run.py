# SPDX-License-Identifier: Apache-2.0
"""The one door to external commands: nothing else imports `subprocess`.

Commands are argument lists, get a built environment, read nothing, write to files (a child left behind
would hold a pipe open) and always have a timeout. What they started goes with them: TERM, then KILL, to
the process group.
"""

import contextlib
import os
import shlex
import signal
import subprocess
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

TimeoutExpired = subprocess.TimeoutExpired
_GRACE_SECONDS = 5.0
_OUTPUT_BYTES = 64 * 1024
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Completed:
    """How a command ended. `status` is as the shell counts: 128+n for signal n, 124 for a timeout."""

    argv: tuple[str, ...]
    status: int
    output: str
    peak_rss_bytes: int


def replay(argv: Sequence[str]) -> str:
    """The command as a person would type it."""
    return shlex.join(argv)


def run(
    argv: Sequence[str],
    *,
    timeout: float,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    stdout: Path | None = None,
) -> Completed:
    """Runs a command to its end and returns how it ended; never raises for a status.

    `output` is the end of what it wrote (standard output too, unless that goes to the file `stdout`).
    Raises FileNotFoundError if there is no such program.
    """
    import tempfile

    with contextlib.ExitStack() as stack:
        messages = stack.enter_context(tempfile.TemporaryFile())
        out = stack.enter_context(open(stdout, "wb")) if stdout else messages
        process = spawn(argv, env=env, cwd=cwd, stdout=out.fileno(), stderr=messages.fileno())
        try:
            status, peak = _wait(process, timeout)
        except BaseException:
            end_group(process)
            raise
        if status is None:
            end_group(process)
            status = 124
        messages.seek(max(0, messages.seek(0, os.SEEK_END) - _OUTPUT_BYTES))
        output = messages.read().decode(errors="replace")
    return Completed(argv=tuple(argv), status=status, output=output, peak_rss_bytes=peak)


def spawn(
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    stdout: int = subprocess.DEVNULL,
    stderr: int = subprocess.DEVNULL,
    pass_fds: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """Starts a command as leader of a session of its own, so that a terminal's signals do not reach it."""
    return subprocess.Popen(
        list(argv),
        stdin=subprocess.DEVNULL,
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
    """Starts a command that stands in for us: with our standard input, in a session of its own, and asked to
    end (SIGTERM) when the thread that calls this ends. Raises OSError if it cannot be started."""
    import ctypes

    libc, parent = ctypes.CDLL(None), os.getpid()

    def die_with_parent() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)

    with warnings.catch_warnings():
        # Python 3.12 warns of any function that is called after a fork beside other threads. This one takes
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
    """Ends a spawned command and all of its process group. The leader is reaped last."""
    for signum, grace in ((signal.SIGTERM, _GRACE_SECONDS), (signal.SIGKILL, _GRACE_SECONDS)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signum)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace)
            break
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _wait(process: subprocess.Popen[bytes], timeout: float) -> tuple[int | None, int]:
    """Waits with wait4, which also tells the peak of resident memory. (None, 0) when time is over."""
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
