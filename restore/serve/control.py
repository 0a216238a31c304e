# SPDX-License-Identifier: Apache-2.0
"""Let other commands act on a server that this process serves, over a socket in the replica's entry.

    $REKINDLE_HOME/replicas/NAME/control    SOCK_SEQPACKET, one JSON object per message

    from the command      the answer
    {"op": "facts"}       {} with a file, which holds what is known about the server, as JSON
    {"op": "idle"}        {"seconds": S}: for how long no client has asked or got anything
    {"op": "waiting"}     {"waiting": N}: how many clients have sent something that nobody has read
    {"op": "hold"}        {"in_flight": N}; new requests wait from now on. Asked again, it counts again
    {"op": "lend"}        {"cell": …} with descriptors: the server's output and error, and the cell's sockets.
                          Nothing is forwarded from now on, unless "still" is false: then only the cell's
                          own socket is the command's
    {"op": "socket",      {} with a socket in the cell's network, {"errno": N} if there is none
     "family": F}
    {"op": "still"}       {}; nothing is forwarded from now on
    {"op": "return",      {}; what has waited is served
     "exits": {PID: …}}

Whatever ends the connection returns the cell, also the death of the command. One command is served at a time;
others are told {"busy": true}.
"""

import contextlib
import errno
import json
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from msgspec import Struct

from rekindle.fields import JSON

MESSAGE_BYTES = 64 << 10
FDS_LIMIT = 8
_SEND_SECONDS = 5.0


class Loan(Struct, frozen=True, kw_only=True):
    """A lent cell as a command gets it: the description of the lent cell, and descriptors."""

    cell: Mapping[str, JSON]
    fds: Sequence[int]


class Loop(Protocol):
    """The loop that serves the clients of a server: `restore.serve.foreground.Serving`."""

    def watch(self, fd: int, readable: Callable[[], object]) -> None:
        """Call `readable` whenever a descriptor is readable."""

    def forget(self, fd: int) -> None:
        """Stop watching a descriptor."""

    def hold(self) -> int:
        """Let new requests wait; return how many are in flight."""

    def idle_seconds(self) -> float:
        """Return for how long no client has asked or got anything."""

    def waiting(self) -> int:
        """Return how many clients have sent something that nobody has read."""

    def leave_cell(self) -> None:
        """Leave the server's cell alone until `resume`, but for new connections."""

    def be_still(self) -> None:
        """Leave the server and its connections alone until `resume`."""

    def resume(self) -> None:
        """Go on after `hold` or `be_still`."""


class Lendable(Protocol):
    """A server whose cell can be lent."""

    def facts(self) -> Mapping[str, JSON]:
        """Return what is known about the server."""

    def lend(self) -> Loan:
        """Stop using the cell, and describe it."""

    def socket(self, family: socket.AddressFamily) -> socket.socket:
        """Return a stream socket in the server's network. Raises OSError."""

    def take_back(self, exits: Mapping[int, int] | None) -> None:
        """Use the cell again. `exits` are wait statuses that the borrower was told; None if it was killed."""


class Control:
    """A context in which the socket exists, served by the loop of `serving`."""

    def __init__(self, directory: Path, serving: Loop, lender: Lendable) -> None:
        self._directory, self._serving, self._lender = directory, serving, lender
        self._client: socket.socket | None = None
        self._is_lent = False
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self._listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            with _short(self._directory) as path:
                self._listener.bind(path)
            self._listener.listen()
            self._serving.watch(self._listener.fileno(), self._accept)
            stack.callback(self._serving.forget, self._listener.fileno())
            stack.callback(self._leave)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        client.settimeout(_SEND_SECONDS)
        if self._client is not None:
            self._serving.watch(client.fileno(), lambda: self._refuse(client))
            return
        self._client = client
        self._serving.watch(client.fileno(), self._answer)

    def _refuse(self, client: socket.socket) -> None:
        """Tell another command, which has asked something, that there is one already."""
        self._serving.forget(client.fileno())
        with client, contextlib.suppress(OSError):
            client.recv(MESSAGE_BYTES)
            client.send(b'{"busy": true}')

    def _answer(self) -> None:
        assert self._client is not None
        try:
            message = self._client.recv(MESSAGE_BYTES)
            if not message:
                self._leave()
                return
            request = json.loads(message)
            match request["op"]:
                case "facts":
                    self._tell_facts()
                case "idle":
                    self._send({"seconds": self._serving.idle_seconds()})
                case "waiting":
                    self._send({"waiting": self._serving.waiting()})
                case "hold":
                    self._send({"in_flight": self._serving.hold()})
                case "lend":
                    self._lend(is_still=request.get("still", True))
                case "socket":
                    self._give_socket(socket.AddressFamily(request["family"]))
                case "still":
                    self._serving.be_still()
                    self._send({})
                case "return":
                    self._return({int(pid): status for pid, status in request["exits"].items()})
                    self._send({})
                case _:
                    self._leave()
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            self._leave()

    def _tell_facts(self) -> None:
        with open(os.memfd_create("facts"), "w+b", buffering=0) as file:
            file.write(json.dumps(self._lender.facts()).encode())
            self._send({}, [file.fileno()])

    def _give_socket(self, family: socket.AddressFamily) -> None:
        try:
            with self._lender.socket(family) as made:
                self._send({}, [made.fileno()])
        except OSError as error:
            self._send({"errno": error.errno or errno.EIO})

    def _lend(self, *, is_still: bool) -> None:
        if is_still:
            self._serving.be_still()
        else:
            self._serving.leave_cell()
        loan = self._lender.lend()
        self._is_lent = True
        self._send({"cell": loan.cell}, loan.fds)

    def _return(self, exits: Mapping[int, int] | None) -> None:
        if self._is_lent:
            self._is_lent = False
            self._lender.take_back(exits)
        self._serving.resume()

    def _send(self, message: Mapping[str, JSON], fds: Sequence[int] = ()) -> None:
        assert self._client is not None
        socket.send_fds(self._client, [json.dumps(message).encode()], list(fds))

    def _leave(self) -> None:
        """Forget the command; it may have been killed."""
        if self._client is not None:
            self._serving.forget(self._client.fileno())
            self._client.close()
            self._client = None
            self._return(None)


def connect(directory: Path) -> socket.socket:
    """Connect to the socket of a replica's entry. Raises OSError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        with _short(directory) as path:
            sock.connect(path)
    except BaseException:
        sock.close()
        raise
    return sock


@contextlib.contextmanager
def _short(directory: Path) -> Iterator[str]:
    """Yield a path of the socket that is short enough for an address, which has at most 107 bytes."""
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/control"
    finally:
        os.close(fd)
