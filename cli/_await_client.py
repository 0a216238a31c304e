# SPDX-License-Identifier: Apache-2.0
"""Wait for the first client of a server on demand, with all that a restore needs loaded already."""

import ctypes
import importlib
import os
import select
import signal
import sys
import time
from collections.abc import Sequence

_PR_SET_PDEATHSIG = 1
_LATE = (
    "restore.rungs.process",
    "restore.serve.control",
    "restore.serve.foreground",
    "rekindle.engine.client",
)
"""What a restore imports while it waits for something else."""


def await_client(fds: Sequence[int], parent: int) -> float:
    """Wait until a client connects to one of the sockets; return for how many seconds that was.

    Until then it ends with its parent; from then on it serves, also if the parent is killed.
    """
    for name in _LATE:
        importlib.import_module(name)
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit(1)
    began = time.monotonic()
    select.select(fds, [], [])
    libc.prctl(_PR_SET_PDEATHSIG, 0, 0, 0, 0)
    return time.monotonic() - began
