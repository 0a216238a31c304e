# SPDX-License-Identifier: Apache-2.0
"""An HTTP client for one server, over connections that the caller makes."""

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable

from msgspec import Struct

from rekindle.engine.address import Endpoint, Request
from rekindle.errors import NotReadyError

_BODY_LIMIT_BYTES = 64 << 20

Connect = Callable[[str, int, float], socket.socket]
"""Makes a TCP connection: host, port, timeout in seconds."""


class Response(Struct, frozen=True, kw_only=True):
    """A complete response.

    `first_byte` is the time.monotonic() at which its body began, which is a stream's first token.
    """

    status: int
    body: bytes
    first_byte: float


class Client:
    """Sends requests to one server, each over its own connection.

    `last_outcome` tells in words what became of the latest request; empty before the first.
    """

    def __init__(self, endpoint: Endpoint, connect: Connect) -> None:
        self._endpoint = endpoint
        self._connect = connect
        self.last_outcome = ""

    def ask(self, request: Request, *, timeout: float) -> Response:
        """Send a request and return the complete response.

        Raises OSError while the server cannot be reached or does not speak HTTP, and NotReadyError if it
        does not finish within `timeout` seconds or its answer is too large.
        """
        asked = f"{request.method} http://{self._endpoint}{request.path}"
        try:
            response = self._ask(request, timeout)
        except (OSError, NotReadyError) as error:
            self.last_outcome = f"{asked}: {getattr(error, 'strerror', None) or error}"
            raise
        self.last_outcome = f"{asked} was answered with status {response.status}"
        return response

    def _ask(self, request: Request, timeout: float) -> Response:
        host, port = self._endpoint.reachable_host, self._endpoint.port
        deadline = time.monotonic() + timeout
        connection = http.client.HTTPConnection(host, port, timeout=timeout)
        connection.sock = self._connect(host, port, timeout)
        # A socket's own timeout restarts with every byte; this one does not.
        timer = threading.Timer(timeout, _shut, [connection.sock])
        timer.daemon = True
        timer.start()
        try:
            body = None if request.body is None else json.dumps(request.body).encode()
            headers = {"Content-Type": "application/json"} if body is not None else {}
            connection.request(request.method, request.path, body, {**headers, **request.headers})
            response = connection.getresponse()
            content = bytearray(response.read1(65536))
            first_byte = time.monotonic()
            while piece := response.read1(65536):
                content += piece
                if len(content) > _BODY_LIMIT_BYTES:
                    raise NotReadyError(f"{request.path} answered with more than {_BODY_LIMIT_BYTES} bytes")
            if time.monotonic() >= deadline:
                raise TimeoutError
            return Response(status=response.status, body=bytes(content), first_byte=first_byte)
        except (OSError, http.client.HTTPException) as error:
            if time.monotonic() >= deadline or isinstance(error, TimeoutError):
                raise NotReadyError(f"{request.path} did not answer within {timeout:.0f} s") from error
            if isinstance(error, OSError):
                raise
            raise ConnectionError(f"{request.path}: {type(error).__name__} {error}") from error
        finally:
            timer.cancel()
            connection.close()

    def get(self, path: str, *, timeout: float, headers: dict[str, str] | None = None) -> Response:
        return self.ask(Request(method="GET", path=path, headers=headers or {}, body=None), timeout=timeout)


def _shut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
