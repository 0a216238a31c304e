# SPDX-License-Identifier: Apache-2.0
"""Connections to registries: pooled, streamed both ways, each wait with a deadline.

urllib3 makes the connections (see connection). Its pool does not fit: ours ends from another thread what is
under way, opens a fresh connection for a body that cannot be sent twice, and forgets what was idle for
long.
"""

import contextlib
import os
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Protocol, Self

from oci.registry.proxy import Proxy, proxy_for
from oci.registry.sockets import Pace, shut
from oci.registry.url import Url
from rekindle import __version__
from rekindle.config import TransferSettings
from rekindle.errors import RegistryError

if TYPE_CHECKING:
    from oci.registry.connection import Connection, ContextFor, HttpResponse

PIECE_BYTES = 1 << 20  # received or sent at once: more is no faster, 8 KiB less than half as fast
_IDLE_SECONDS = 20.0  # registries and what stands before them drop idle connections after 30 to 60 s
_DRAIN_BYTES = 8 << 10  # of an unread answer: receiving it is faster than connecting again
_GRACE_BYTES = 256 << 20  # a registry hashes and moves what it got before it answers
_REFUSAL_SECONDS = 1.0

Origin = tuple[str, str, int]


class Body(Protocol):
    """The content that is sent with a request; read again for every attempt."""

    @property
    def length(self) -> int:
        """Bytes of all pieces."""

    @property
    def is_repeatable(self) -> bool:
        """Whether it may be sent to the same URL again if it broke midway.

        docker-registry appends what comes then to what it already has of an upload.
        """

    def pieces(self) -> Iterator[bytes | memoryview]:
        """Give all of it; a piece is valid until the next one."""


class Answer:
    """A response whose body has yet to be read. Left unread, its connection is not used again.

    Belongs to one thread; only `abort` is for others.
    """

    def __init__(
        self,
        pool: "Connections",
        connection: "Connection",
        response: "HttpResponse",
        url: Url,
        *,
        is_last: bool,
    ) -> None:
        """`is_last` says that the connection cannot be used again."""
        self._pool = pool
        self._connection = connection
        self._response = response
        self._lock = threading.Lock()
        self._closed = False
        self._broken = is_last
        self.url = url
        self.status = response.status
        self.headers = response.headers
        self.length = response.length
        self.giver: object = None  # the host that gave it, for callers that ask several

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def readinto(self, into: memoryview) -> int:
        """Read some bytes, as soon as there are any; 0 at the end.

        Raises TimeoutError if they stall, ConnectionError if the connection breaks before the end that was
        announced.
        """
        try:
            return self._response.readinto(into)
        except TimeoutError as error:
            self._broken = True
            raise TimeoutError(f"{self.url} stalls: {error}") from error
        except (OSError, ValueError) as error:  # ValueError: malformed chunks
            self._broken = True
            raise ConnectionError(f"{self.url}: {error}") from error
        except BaseException:
            self._broken = True
            raise

    def read(self, limit_bytes: int) -> bytes:
        """Read the whole body. Raises RegistryError if it is longer than that."""
        content = bytearray()
        buffer = memoryview(bytearray(min(PIECE_BYTES, limit_bytes + 1)))
        while count := self.readinto(buffer):
            content += buffer[:count]
            if len(content) > limit_bytes:
                raise RegistryError(f"{self.url} answers with more than {limit_bytes} bytes")
        return bytes(content)

    def abort(self) -> None:
        """End a read that another thread waits in.

        Without effect once it is closed: by then, the connection may serve another request.
        """
        with self._lock:
            if not self._closed:
                self._broken = True
                self._connection.shut()

    def close(self) -> None:
        """Give the connection back, if it can be used again. Idempotent."""
        left = self._response.left
        if left is not None and left <= _DRAIN_BYTES and self._is_whole():
            with contextlib.suppress(OSError):
                while self.readinto(memoryview(bytearray(_DRAIN_BYTES))):
                    pass
        with self._lock:
            if self._closed:
                return
            self._closed = True
        again = self._response.is_at_end and self._is_whole()
        self._response.close()
        if again:
            self._pool.give_back(self.url, self._connection)
        else:
            self._pool.drop(self._connection)

    def _is_whole(self) -> bool:
        return not self._broken and not self._response.is_last


class Connections:
    """A pool of connections to any host, kept open between requests. For many threads."""

    def __init__(self, settings: TransferSettings, context_for: "ContextFor") -> None:
        """`context_for` gives the TLS context for a host and port."""
        self.settings = settings
        self._context_for = context_for
        self._lock = threading.Lock()
        self._idle: dict[Origin, list[tuple[float, Connection]]] = defaultdict(list)
        self._open: set[Connection] = set()
        self._dialed: set[socket.socket] = set()
        self._closed = False
        self.met: set[Origin] = set()  # origins that have answered

    def proxy(self, url: Url) -> Proxy | None:
        """Return the proxy through which a URL is reached. Raises RegistryError."""
        return proxy_for(url, os.environ)

    def request(self, method: str, url: Url, headers: Mapping[str, str], body: Body | None = None) -> Answer:
        """Send one request and return the answer, whatever its status.

        Raises OSError if the host cannot be reached or does not answer in time. A kept connection that the
        other side had closed meanwhile is replaced silently.
        """
        fresh = body is not None and not body.is_repeatable
        while True:
            connection, kept = self._take(url, fresh=fresh)
            try:
                return self._exchange(connection, method, url, headers, body)
            except ConnectionError:
                self.drop(connection)
                if not kept or self._closed:
                    raise
                fresh = True
            except BaseException:
                self.drop(connection)
                raise

    def _exchange(
        self, connection: "Connection", method: str, url: Url, headers: Mapping[str, str], body: Body | None
    ) -> Answer:
        stall = self.settings.stall_seconds
        length = body.length if body is not None else 0
        # A digest is of the bytes as they are stored.
        ours = {"User-Agent": f"rekindle/{__version__}", "Accept-Encoding": "identity"}
        if body is not None:
            ours["Content-Length"] = str(length)
        pieces = body.pieces() if body is not None else None
        try:
            connection.send(method, url, {**ours, **headers}, pieces, Pace(stall))
        except OSError as error:
            # A host that refuses a body may answer and hang up before all of it was sent.
            try:
                response = connection.receive(Pace(min(_REFUSAL_SECONDS, stall)))
            except OSError as told:
                # Of all errors, only a TLS alert says more than that the connection broke.
                raise (told if "ALERT" in str(told) else error) from None
            return Answer(self, connection, response, url, is_last=True)
        response = connection.receive(Pace(stall, grace_seconds=stall * (length // _GRACE_BYTES)))
        self.met.add(url.origin)
        return Answer(self, connection, response, url, is_last=False)

    def _take(self, url: Url, *, fresh: bool) -> tuple["Connection", bool]:
        """Return a connection, and whether it is a kept one."""
        with self._lock:
            self._raise_if_closed()
            idle = self._idle[url.origin]
            while idle and not fresh:
                since, connection = idle.pop()
                if time.monotonic() - since < _IDLE_SECONDS:
                    return connection, True
                self._open.discard(connection)
                connection.close()
        from oci.registry.connection import Connection  # the import takes 50 ms

        connection = Connection.open(
            url,
            self.proxy(url),
            self._context_for,
            seconds=self.settings.connect_seconds,
            watch=self._watch,
        )
        with self._lock:
            self._open.add(connection)
            if self._closed:
                self._open.discard(connection)
                connection.close()
            self._raise_if_closed()
        return connection, False

    @contextlib.contextmanager
    def _watch(self, sock: socket.socket) -> Iterator[None]:
        """End the wait for a socket to connect if all is closed meanwhile."""
        with self._lock:
            self._raise_if_closed()
            self._dialed.add(sock)
        try:
            yield
        finally:
            with self._lock:
                self._dialed.discard(sock)

    def _raise_if_closed(self) -> None:
        if self._closed:
            raise ConnectionAbortedError("all connections were closed")

    def give_back(self, url: Url, connection: "Connection") -> None:
        """Keep a connection for the next request to the same origin."""
        with self._lock:
            idle = self._idle[url.origin]
            if not self._closed and len(idle) < self.settings.jobs:
                idle.append((time.monotonic(), connection))
                return
        self.drop(connection)

    def drop(self, connection: "Connection") -> None:
        """Close a connection that is of no more use."""
        with self._lock:
            self._open.discard(connection)
        connection.close()

    def close(self) -> None:
        """End everything, also what other threads wait for."""
        with self._lock:
            self._closed = True
            idle = [connection for each in self._idle.values() for _, connection in each]
            self._idle.clear()
            for connection in idle:
                self._open.discard(connection)
                connection.close()
            # Their own threads close them: to close them here would free their descriptors while in use.
            for connection in self._open:
                connection.shut()
            for sock in self._dialed:
                shut(sock)
