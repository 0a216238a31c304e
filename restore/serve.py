# SPDX-License-Identifier: Apache-2.0
"""A replica in the foreground: signals go to the server, its end is ours."""

import contextlib
import os
import resource
import selectors
import signal
import socket
from collections.abc import Iterator

from rekindle.cell import Cell, exit_status
from rekindle.record import Record
from restore.forward import Forwarder

_FORWARDED = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
)


def serve(cell: Cell, record: Record, published: socket.socket | None) -> int:
    """Runs until the server ends; returns its exit status as the shell counts."""
    # Two descriptors a connection; the server's own limit is the one that it was dumped with.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with selectors.DefaultSelector() as selector, _signals(cell, record) as wakeups:
        forwarder = Forwarder(selector, cell, record.endpoint)
        if published is not None:
            forwarder.accept_from(published)
        selector.register(wakeups, selectors.EVENT_READ, lambda _: os.read(wakeups, 4096))
        selector.register(cell, selectors.EVENT_READ, lambda _: None)
        try:
            while True:
                status = cell.wait(record.process.root_pid, 0.0)
                if status is not None:
                    return exit_status(status)
                for key, mask in selector.select():
                    key.data(mask)
        finally:
            forwarder.close()


@contextlib.contextmanager
def _signals(cell: Cell, record: Record) -> Iterator[int]:
    """Passes signals on to the server while it serves; yields a descriptor that wakes a selector."""

    def pass_on(signum: int, _: object) -> None:
        cell.signal(record.process.server_pid, signum)

    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.set_blocking(writer, False)
    heeded = [signum for signum in _FORWARDED if signal.getsignal(signum) is not signal.SIG_IGN]
    before = {signum: signal.signal(signum, pass_on) for signum in heeded}
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield reader
    finally:
        signal.set_wakeup_fd(wakeup)
        for signum, handler in before.items():
            signal.signal(signum, handler)
        os.close(reader)
        os.close(writer)
