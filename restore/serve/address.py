# SPDX-License-Identifier: Apache-2.0
"""The published address: taken before the server is there, listened on once it is."""

import socket

from rekindle.engine import Endpoint
from rekindle.errors import PortError

_BACKLOG = 1024


def bind(endpoint: Endpoint) -> socket.socket:
    """Takes an address without listening: connections are refused until `listen`. Raises PortError."""
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
    except (OSError, ValueError, TypeError) as error:  # the latter two for what is no host name at all
        raise _taken(endpoint, error) from error
    return sock


def listen(sock: socket.socket, endpoint: Endpoint) -> None:
    """Opens an address that was bound. Raises PortError if somebody else was faster."""
    try:
        sock.listen(_BACKLOG)
    except OSError as error:
        raise _taken(endpoint, error) from error


def _taken(endpoint: Endpoint, error: Exception) -> PortError:
    return PortError(
        f"{endpoint} cannot be published",
        cause=getattr(error, "strerror", None) or str(error),
        hint="choose another with --publish [HOST:]PORT, or end what listens there",
    )
