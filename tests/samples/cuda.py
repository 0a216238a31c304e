# SPDX-License-Identifier: Apache-2.0
"""A command that checkpoints CUDA processes, and the clients that it starts."""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

from rekindle.home import Home
from tests.conftest import ROOT

# A command that runs a session as ours do, and says what came of it.
PROGRAM = """
import json, signal, sys, time
from pathlib import Path
from rekindle.cuda.search import find
from rekindle.cuda.session import Session
from rekindle.errors import CudaError, Interrupted
from rekindle.home import Home

def interrupt(signum, _):
    raise Interrupted(signum)

signal.signal(signal.SIGTERM, interrupt)
home, journal, timeout, *pids = sys.argv[1:]
with Home(Path(home)).work("snapshot") as directory:
    backend = find(Home(Path(home)))
    try:
        with Session(backend, [int(pid) for pid in pids], directory / journal) as session:
            session.checkpoint_all(float(timeout))
            print("checkpointed", flush=True)
            while True:
                time.sleep(0.1)
    except CudaError as error:
        print(f"{error.message} | {error.cause}", flush=True)
        sys.exit(error.exit_status)
    except Interrupted as interrupted:
        print(*getattr(interrupted, "__notes__", ()), flush=True)
        sys.exit(128 + interrupted.signum)
    finally:
        backend.close()
"""


def session_command(home: Home, pids: list[int], *, timeout: float = 20) -> "subprocess.Popen[str]":
    words = [str(home.root), "cuda.json", str(timeout), *map(str, pids)]
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", PROGRAM, *words],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def clients(pid: int = 0) -> list[int]:
    """Return the live clients with a driver that this process, or another one, has started."""
    # Not from /proc/PID/task/*/children: when a thread ends, its children move to another thread's list.
    parent = pid or os.getpid()
    return [
        child for child in map(int, filter(str.isdecimal, os.listdir("/proc"))) if is_client(child, parent)
    ]


def is_client(pid: int, parent: int) -> bool:
    with contextlib.suppress(OSError):
        while True:
            state, its_parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
            if state in "ZX" or int(its_parent) != parent:
                break
            # It is empty for a moment after Popen has returned, until execve(2) has set the new one.
            if command := Path(f"/proc/{pid}/cmdline").read_bytes():
                return b"cuda/client.py" in command
            time.sleep(0.001)
    return False
