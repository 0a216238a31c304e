# SPDX-License-Identifier: Apache-2.0
"""Borrow the cell of a replica that another rekindle serves, while that holds back its clients.

Nobody is disconnected: new connections and requests wait, and those that are in flight get the time to
finish. One that takes longer waits in the middle, and goes on when the cell is returned.
"""

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping

from rekindle import documents
from rekindle.cell.borrowed import BorrowedCell, LentCell
from rekindle.errors import BusyError, CapabilityError, WorkloadError
from rekindle.fields import JSON
from rekindle.replicas import ReplicaEntry
from rekindle.report import Pause
from restore.options import Output
from restore.serve import control

_ANSWER_SECONDS = 30.0
_POLL_SECONDS = 0.01


class Lender:
    """The rekindle that serves a replica, as seen by a command. Use it as a context.

    Entering it raises CapabilityError for a replica that cannot be acted on. The methods raise BusyError if
    another command acts on it, WorkloadError if it has ended.
    """

    def __init__(self, replica: ReplicaEntry) -> None:
        self._replica = replica
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Lender":
        try:
            self._sock = self._stack.enter_context(control.connect(self._replica.directory))
        except OSError as error:
            raise CapabilityError(
                f"the replica '{self._replica.name}' cannot be acted on",
                cause=f"{self._replica.state}, {self._replica.status.rung or 'no'} rung: {error}",
                hint="only a server in a cell can: one that was restored, or started by `rekindle run`",
            ) from error
        self._sock.settimeout(_ANSWER_SECONDS)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def facts(self) -> Mapping[str, JSON]:
        """Return what the server's rekindle knows about it."""
        _, fds = self._ask({"op": "facts"})
        with open(fds[0], "rb") as file:
            file.seek(0)
            found: Mapping[str, JSON] = json.load(file)
        return found

    def idle_seconds(self) -> float:
        """Return for how long no client has asked or got anything."""
        return float(self._ask({"op": "idle"})[0]["seconds"])

    def waiting(self) -> int:
        """Return how many clients have sent something that nobody has read."""
        return int(self._ask({"op": "waiting"})[0]["waiting"])

    def hold(self, drain_seconds: float, pause: Pause) -> None:
        """Hold clients back until the cell is returned. Return once nothing is in flight or the time is over.

        `pause` gets what they notice of it.
        """
        began = time.monotonic()
        in_flight = self._ask({"op": "hold"})[0]["in_flight"]
        while in_flight and time.monotonic() - began < drain_seconds:
            time.sleep(_POLL_SECONDS)
            in_flight = self._ask({"op": "hold"})[0]["in_flight"]
        self._ask({"op": "still"})
        pause.begin(began, in_flight)

    @contextlib.contextmanager
    def lent(self, pause: Pause) -> Iterator[tuple[BorrowedCell, Output]]:
        """Borrow the cell, and the server's output, while it serves on until `hold` is called."""
        exits: dict[int, int] = {}
        with contextlib.ExitStack() as stack:
            message, fds = self._ask({"op": "lend", "still": False})
            stack.callback(self._return, exits, pause)
            stdout, stderr, *rest = fds
            for fd in (stdout, stderr):
                stack.callback(os.close, fd)
            lent = documents.read(message["cell"], LentCell, "the lent cell")
            cell = stack.enter_context(BorrowedCell(lent, rest, self._socket))
            stack.callback(lambda: exits.update(cell.exits))
            yield cell, Output(stdout=stdout, stderr=stderr)

    def _socket(self, family: socket.AddressFamily) -> socket.socket:
        """Return a socket in the network of the cell. Raises OSError."""
        answer, fds = self._ask({"op": "socket", "family": int(family)})
        if not fds:
            raise OSError(answer["errno"], f"the cell's network: {os.strerror(answer['errno'])}")
        return socket.socket(family, socket.SOCK_STREAM, 0, fileno=fds[0])

    def _return(self, exits: Mapping[int, int], pause: Pause) -> None:
        with contextlib.suppress(WorkloadError):  # it has ended, with its server
            self._ask({"op": "return", "exits": exits})
        pause.end()

    def _ask(self, request: Mapping[str, JSON]) -> tuple[Mapping[str, JSON], list[int]]:
        try:
            self._sock.send(json.dumps(request).encode())
            content, fds, _, _ = socket.recv_fds(
                self._sock, control.MESSAGE_BYTES, control.FDS_LIMIT, socket.MSG_CMSG_CLOEXEC
            )
        except OSError as error:
            raise WorkloadError(
                f"the rekindle of the replica '{self._replica.name}' does not answer", cause=str(error)
            ) from error
        if not content:
            raise WorkloadError(f"the replica '{self._replica.name}' has ended")
        answer = json.loads(content)
        if answer.get("busy"):
            raise BusyError(f"another command acts on the replica '{self._replica.name}'")
        return answer, fds
