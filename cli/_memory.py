# SPDX-License-Identifier: Apache-2.0
"""The memory of replicas."""

import os

from rekindle.cell import descendants
from rekindle.errors import CapabilityError
from rekindle.proc import memory_bytes
from rekindle.replicas import ReplicaEntry


def of(replica: ReplicaEntry) -> tuple[int, int] | None:
    """Return the bytes of a server's own memory, and of its mapped files.

    None if it does not run, or runs in another PID namespace, where its PIDs mean other processes here.
    """
    process = replica.status.cell or replica.status.serving
    if not replica.runs:
        return None
    try:
        fd = process.open()
    except CapabilityError:
        return None
    if fd is None:  # it has ended a moment ago
        return None
    try:
        return memory_bytes(descendants.of(process.pid))
    finally:
        os.close(fd)
