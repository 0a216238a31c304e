# SPDX-License-Identifier: Apache-2.0
"""Call the hooks of a server's Python processes around its dump."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from rekindle.cell import Cell, hook, processes
from rekindle.errors import RekindleError, WorkloadError
from rekindle.report import Report
from snapshot.server import Server

_TIMEOUT_SECONDS = 60.0


def before_snapshot(cell: Cell, server: Server, report: Report) -> tuple[int, ...]:
    """Call what the server wants to do before its snapshot; return the PIDs that will be reseeded.

    Reports the Python processes that have no hook. Raises WorkloadError.
    """
    if server.reseed is hook.Reseed.NONE:
        return ()
    with report.phase("before snapshot"):
        for pid in hook.without_hook(cell, server.root_pid):
            what = processes.command(cell, pid)
            report.say(f"replicas will share the random numbers of process {pid}: {what}")
        return _call(cell, hook.HookPhase.BEFORE_SNAPSHOT, server.stderr)


@contextlib.contextmanager
def around_dump(cell: Cell, known: Sequence[int], report: Report) -> Iterator[tuple[int, ...]]:
    """Call the hooks of a replica before it is dumped, and when it runs on; yield the PIDs that have one.

    `known` are those of its image; without any, there are no hooks. Raises WorkloadError.
    """
    if not known:
        yield ()
        return
    try:
        with report.phase("before snapshot"):
            hooked = _call(cell, hook.HookPhase.BEFORE_SNAPSHOT)
        yield hooked
    finally:
        after_dump(cell, report)


def after_dump(cell: Cell, report: Report) -> None:
    """Call the hooks of a server that runs on after its dump. Raises nothing."""
    try:
        hook.renew_generation(cell.root)
        _call(cell, hook.HookPhase.AFTER_RESTORE)
    except (RekindleError, OSError) as error:
        report.say(f"WARNING: the server may not go on as before its snapshot: {error}")


def _call(cell: Cell, phase: hook.HookPhase, log: Path | None = None) -> tuple[int, ...]:
    try:
        return tuple(hook.call(cell, phase, _TIMEOUT_SECONDS))
    except hook.HookError as error:
        raise WorkloadError(
            f"the hook `{phase}` failed in process {error.pid} ({processes.command(cell, error.pid)})",
            cause=error.problem,
            hint="to do without the hooks, and let replicas share random numbers, --reseed none",
            log=log,
        ) from error
