# SPDX-License-Identifier: Apache-2.0
"""Notify the platform that the server is ready: systemd by its socket, others by a file."""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from rekindle.errors import UsageError

_SEND_SECONDS = 1.0  # limit if the receiver does not read


def systemd(state: str) -> None:
    """Send a state (sd_notify(3): `READY=1`, `STOPPING=1`) to $NOTIFY_SOCKET, if it is set."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.settimeout(_SEND_SECONDS)
        sock.sendto(state.encode(), address)


@contextlib.contextmanager
def ready_file(path: Path | None) -> Iterator[None]:
    """Remove the ready file now and at the end of the context.

    Raises UsageError if the file cannot be created.
    """
    if path is None:
        yield
        return
    try:
        if path.exists() and not path.is_file():  # such as /dev/null
            raise UsageError(f"cannot use --ready-file {path}", cause="not a regular file")
        path.unlink(missing_ok=True)
        parent = os.access(path.parent, os.W_OK | os.X_OK)
    except OSError as error:
        raise UsageError(f"cannot use --ready-file {path}", cause=str(error)) from None
    if not parent:
        raise UsageError(f"cannot use --ready-file {path}", cause=f"{path.parent} is not writable")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def ready(path: Path | None) -> None:
    """Create the ready file, and tell systemd that the server is ready."""
    if path is not None:
        with contextlib.suppress(OSError):
            path.touch()
    systemd("READY=1\nSTATUS=serving")


def stopping(path: Path | None) -> None:
    """Remove the ready file, and tell systemd that the server is stopping."""
    if path is not None:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
    systemd("STOPPING=1")
