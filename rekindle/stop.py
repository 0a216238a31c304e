# SPDX-License-Identifier: Apache-2.0
"""End replicas: ask them, then kill what has not ended in time."""

import contextlib
import os
import signal
import time
from collections.abc import Sequence

from rekindle import replicas
from rekindle.cell import descendants
from rekindle.home import Home
from rekindle.replicas import ReplicaEntry

_KILL_SECONDS = 5.0


def stop(home: Home, names: Sequence[str], timeout: float) -> None:
    """End the replicas with these names; return when all have ended.

    Each gets SIGTERM, and after `timeout` seconds its server SIGKILL. One that has ended already is left
    alone. Raises NotFoundError, before any is asked to end, if there is none of a name.
    """
    found = [replicas.find(home, name) for name in names]
    for replica in found:
        _signal(replica, signal.SIGTERM)
        replicas.forget(home, replica.name)
    deadline = time.monotonic() + timeout
    for replica in found:
        if replicas.wait(replica, max(0.0, deadline - time.monotonic())):
            continue
        # The server first, so that its rekindle can note and clean up.
        _kill_server(replica)
        if not replicas.wait(replica, _KILL_SECONDS):
            _signal(replica, signal.SIGKILL)
            replicas.wait(replica)


def _signal(replica: ReplicaEntry, signum: int) -> None:
    """Signal the rekindle that serves a replica, if it runs."""
    if not replica.runs:
        return
    fd = replica.status.serving.open()
    if fd is not None:
        with open(fd, "rb"), contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(fd, signum)


def _kill_server(replica: ReplicaEntry) -> None:
    """Kill the processes of a replica's cell, or those below its rekindle on a lower rung."""
    replica = replicas.look_again(replica)
    top = replica.status.cell or replica.status.serving
    fd = top.open() if replica.runs else None
    if fd is None:
        return
    with open(fd, "rb"), contextlib.ExitStack() as opened:
        below = {}
        for pid in descendants.of(top.pid):
            with contextlib.suppress(ProcessLookupError):
                below[pid] = os.pidfd_open(pid)
                opened.callback(os.close, below[pid])
        still = set(descendants.of(top.pid))  # seen again after they were opened: no PID was another's
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(fd, 0)  # and neither was that of their ancestor
            for pid in still & below.keys():
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(below[pid], signal.SIGKILL)
