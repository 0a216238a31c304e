# SPDX-License-Identifier: Apache-2.0
"""A daemon outside a server: it accepts connections, and answers each byte with its name."""

import contextlib
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def outside_daemon(at: Path | socket.socket, name: str) -> Iterator[None]:
    """Runs one at a path, or with a listener."""
    with contextlib.ExitStack() as stack:
        if isinstance(at, Path):
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(str(at))
            listener.listen()
        else:
            listener = at
        process = subprocess.Popen([sys.executable, __file__, name], stdin=listener.fileno())
        stack.callback(process.wait)
        stack.callback(process.kill)
        yield


def serve(sock: socket.socket, name: str) -> None:
    while sock.recv(1):
        sock.sendall(name.encode())


def main() -> None:
    listener = socket.socket(fileno=0)
    while True:
        threading.Thread(target=serve, args=[listener.accept()[0], sys.argv[1]], daemon=True).start()


if __name__ == "__main__":
    main()
