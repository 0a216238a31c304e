# SPDX-License-Identifier: Apache-2.0
"""Make a snapshot of a server: start, warm, ask, check, dump, pack, sign, prove, publish.

    from snapshot import SnapshotOptions, snapshot

    image = snapshot(SnapshotOptions(image="tiny", command=("vllm", "serve", "MODEL")))

docs/library.md shows more. Names are imported when they are first used, so that a program which needs one
module does not load the others.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from snapshot.flow import snapshot
    from snapshot.foreign import save_process
    from snapshot.lent import save_running
    from snapshot.options import Progress, ReplicaOptions, SnapshotOptions
    from snapshot.replica import RunningReplica, save_replica

__all__ = [
    "Progress",
    "ReplicaOptions",
    "RunningReplica",
    "SnapshotOptions",
    "save_process",
    "save_replica",
    "save_running",
    "snapshot",
]


def __getattr__(name: str) -> Any:
    if name in {"snapshot"}:
        from snapshot import flow

        return getattr(flow, name)
    if name in {"RunningReplica", "save_replica"}:
        from snapshot import replica

        return getattr(replica, name)
    if name == "save_process":
        from snapshot import foreign

        return foreign.save_process
    if name == "save_running":
        from snapshot import lent

        return lent.save_running
    if name in {"Progress", "ReplicaOptions", "SnapshotOptions"}:
        from snapshot import options

        return getattr(options, name)
    raise AttributeError(f"module 'snapshot' has no attribute {name!r}")
