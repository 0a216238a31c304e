# SPDX-License-Identifier: Apache-2.0
"""Tells whoever started us that the server is ready: systemd by its socket, others by a file."""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from rekindle.errors import UsageError

_PATIENCE_SECONDS = 1.0  # with somebody who does not read


def systemd(state: str) -> None:
    """Sends a state (sd_notify(3): `READY=1`, `STOPPING=1`) to $NOTIFY_SOCKET, if there is one."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.settimeout(_PATIENCE_SECONDS)
        sock.sendto(state.encode(), address)


@contextlib.contextmanager
def ready_file(path: Path | None) -> Iterator[None]:
    """Sees to it that the file is there only while the server is ready: removed now, and at the end. Raises
    UsageError for a file that cannot be made."""
    if path is None:
        yield
        return
    try:
        if path.exists() and not path.is_file():  # such as /dev/null
            raise UsageError(f"--ready-file {path} cannot be used", cause="it is no regular file")
        path.unlink(missing_ok=True)
        parent = os.access(path.parent, os.W_OK | os.X_OK)
    except OSError as error:
        raise UsageError(f"--ready-file {path} cannot be used", cause=str(error)) from None
    if not parent:
        raise UsageError(f"--ready-file {path} cannot be used", cause=f"{path.parent} cannot be written to")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def ready(path: Path | None) -> None:
    """The server is ready now."""
    if path is not None:
        with contextlib.suppress(OSError):
            path.touch()
    systemd("READY=1\nSTATUS=serving")


def stopping(path: Path | None) -> None:
    """The server is ending, or has ended."""
    if path is not None:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
    systemd("STOPPING=1")
