# SPDX-License-Identifier: Apache-2.0
"""The published address: bound before the server starts, opened once it is ready."""

import socket
from types import TracebackType
from typing import Self

from rekindle.engine import Endpoint
from rekindle.errors import PortError

_BACKLOG = 1024


def bind(endpoint: Endpoint) -> socket.socket:
    """Bind an address without listening: connections are refused until `listen`. Raises PortError."""
    family = socket.AF_INET6 if ":" in endpoint.host else socket.AF_INET
    try:
        if not endpoint.host.replace(".", "").isdigit() and family is socket.AF_INET:
            address = socket.getaddrinfo(endpoint.host, endpoint.port, family)[0][4][0]
        else:
            address = endpoint.host
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((address, endpoint.port))
        except BaseException:
            sock.close()
            raise
    except (OSError, ValueError, TypeError) as error:  # ValueError and TypeError: an invalid host name
        raise _port_error(endpoint, error) from error
    return sock


def listen(sock: socket.socket, endpoint: Endpoint) -> None:
    """Listen on a bound address. Raises PortError if another process listens there by now."""
    try:
        sock.listen(_BACKLOG)
    except OSError as error:
        raise _port_error(endpoint, error) from error


class Address:
    """The published address of a restore: bound by us, or released for the server to bind.

    `endpoint` is None if it is unknown where the server will listen; nothing is bound then.
    """

    def __init__(self, endpoint: Endpoint | None) -> None:
        """Bind the address. Raises PortError if it is taken."""
        self.endpoint = endpoint
        self._bound = bind(endpoint) if endpoint is not None else None

    def is_forwarded(self, listens: Endpoint | None) -> bool:
        """Return whether a server that listens at `listens` must be forwarded to this address."""
        if listens is None or self.endpoint is None or self.endpoint == listens:
            return False
        return not (self.endpoint.port == listens.port and listens.host in {"", "0.0.0.0", "::"})

    def listen(self) -> socket.socket | None:
        """Listen on the address and return its socket; None if none is bound. Raises PortError."""
        if self._bound is None or self.endpoint is None:
            return None
        listen(self._bound, self.endpoint)
        return self._bound

    def release(self) -> None:
        """Close the socket, so that the server can bind the address. Idempotent."""
        if self._bound is not None:
            self._bound.close()
            self._bound = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def _port_error(endpoint: Endpoint, error: Exception) -> PortError:
    return PortError(
        f"cannot publish {endpoint}",
        cause=getattr(error, "strerror", None) or str(error),
        hint="choose another address with --publish [HOST:]PORT, or end the process that listens there",
    )
