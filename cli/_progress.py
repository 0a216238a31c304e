# SPDX-License-Identifier: Apache-2.0
"""Show the progress of a transfer: a bar on a terminal, a line every ten seconds elsewhere."""

import contextlib
import sys
import threading
from collections.abc import Iterator

from oci.progress import Tally
from rekindle import log

_REFRESH_SECONDS = 0.1
_LINE_SECONDS = 10.0


@contextlib.contextmanager
def shown(tally: Tally, *, quiet: bool) -> Iterator[None]:
    """Show a tally on stderr within the context, unless `quiet`."""
    if quiet:
        yield
        return
    over = threading.Event()
    show = _bar if sys.stderr.isatty() and not log.is_json() else _lines
    thread = threading.Thread(target=show, args=[tally, over], daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _done(tally: Tally) -> int:
    """Return how many of the expected bytes are done. A copy fetches and sends each byte."""
    return min(tally.reused_bytes + max(tally.fetched_bytes, tally.sent_bytes), tally.expected_bytes)


def _bar(tally: Tally, over: threading.Event) -> None:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[reused]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=None, reused="")
        while not over.wait(_REFRESH_SECONDS):
            reused = f"{tally.reused_blobs} of {tally.blobs} blobs reused" if tally.reused_blobs else ""
            progress.update(task, total=tally.expected_bytes or None, completed=_done(tally), reused=reused)


def _lines(tally: Tally, over: threading.Event) -> None:
    before = _done(tally)
    while not over.wait(_LINE_SECONDS):
        now = _done(tally)
        rate = (now - before) / _LINE_SECONDS
        left = f"{(tally.expected_bytes - now) / rate:.0f} s left" if rate else "stalled"
        log.write(f"{now:,} of {tally.expected_bytes:,} bytes, {rate / 1e6:.1f} MB/s, {left}")
        before = now


def progress(tally: Tally | None, *, quiet: bool) -> contextlib.AbstractContextManager[None]:
    """Show a tally on stderr within the context, if there is one."""
    return contextlib.nullcontext() if tally is None else shown(tally, quiet=quiet)
