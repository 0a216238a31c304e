# SPDX-License-Identifier: Apache-2.0
"""A transfer's progress, for people: a bar on a terminal, a line every ten seconds elsewhere."""

import contextlib
import sys
import threading
from collections.abc import Iterator

from oci.progress import Tally

_LOOK_SECONDS = 0.1
_LINE_SECONDS = 10.0


@contextlib.contextmanager
def shown(tally: Tally, *, quiet: bool) -> Iterator[None]:
    """Shows a tally on stderr as long as the block lasts."""
    if quiet:
        yield
        return
    over = threading.Event()
    show = _bar if sys.stderr.isatty() else _lines
    thread = threading.Thread(target=show, args=[tally, over], daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _done(tally: Tally) -> int:
    """Of the expected bytes, those that need not be moved any more. A copy moves each twice."""
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
        TextColumn("{task.fields[had]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=None, had="")
        while not over.wait(_LOOK_SECONDS):
            had = f"{tally.reused_blobs} of {tally.blobs} blobs were there" if tally.reused_blobs else ""
            progress.update(task, total=tally.expected_bytes or None, completed=_done(tally), had=had)


def _lines(tally: Tally, over: threading.Event) -> None:
    before = _done(tally)
    while not over.wait(_LINE_SECONDS):
        now = _done(tally)
        rate = (now - before) / _LINE_SECONDS
        left = f"{(tally.expected_bytes - now) / rate:.0f} s left" if rate else "nothing moves"
        print(
            f"rekindle: {now:,} of {tally.expected_bytes:,} bytes, {rate / 1e6:.1f} MB/s, {left}",
            file=sys.stderr,
            flush=True,
        )
        before = now


def progress(tally: Tally | None, *, quiet: bool) -> contextlib.AbstractContextManager[None]:
    """Show what is fetched, if anything is."""
    return contextlib.nullcontext() if tally is None else shown(tally, quiet=quiet)
