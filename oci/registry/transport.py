# SPDX-License-Identifier: Apache-2.0
"""HTTP/1.1 connections to registries: pooled, streamed both ways, each wait with a deadline."""

import base64
import contextlib
import http.client
import io
import socket
import threading
import time
import urllib.parse
import urllib.request
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

from rekindle import __version__
from rekindle.config import Patience
from rekindle.errors import RegistryError

PIECE_BYTES = 1 << 20  # received or sent at once: more is no faster, 8 KiB less than half as fast
_IDLE_SECONDS = 20.0  # registries and what stands before them drop idle connections after 30 to 60 s
_DRIP_BYTES = 16 << 10  # whoever sends less than this within the stall time has stalled


@dataclass(frozen=True, slots=True, kw_only=True)
class Url:
    """An absolute http or https URL. `target` is its path and query."""

    scheme: str
    host: str
    port: int
    target: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises ValueError for another scheme, for user and password in it, and for what is no URL."""
        parts = urllib.parse.urlsplit(text)
        if parts.scheme not in {"http", "https"} or not parts.hostname or "@" in parts.netloc:
            raise ValueError(f"no http or https URL: {text[:200]!r}")
        target = urllib.parse.quote((parts.path or "/"), safe="/%:@!$&'()*+,;=~-._")
        if parts.query:
            target += "?" + urllib.parse.quote(parts.query, safe="/%:@!$&'()*+,;=?~-._")
        port = parts.port or (443 if parts.scheme == "https" else 80)
        return cls(scheme=parts.scheme, host=parts.hostname, port=port, target=target)

    @property
    def origin(self) -> tuple[str, str, int]:
        """What must be the same for credentials to be sent along."""
        return self.scheme, self.host, self.port

    def __str__(self) -> str:
        """Without the query, which may be a credential: so are signed links."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}{self.target.partition('?')[0]}"


class Body(Protocol):
    """What is sent with a request, `length` bytes; called anew for every try."""

    @property
    def length(self) -> int:
        """Bytes."""

    def send(self, connection: http.client.HTTPConnection) -> None:
        """Sends all of it."""


class Answer:
    """A response whose body has yet to be read. Left unread to its end, its connection is not used again."""

    def __init__(
        self,
        pool: "Connections",
        connection: http.client.HTTPConnection,
        response: http.client.HTTPResponse,
        url: Url,
    ) -> None:
        self._pool = pool
        self._connection = connection
        self._response = response
        self._left = response.length  # None for a body in chunks, or up to the connection's end
        self._window_began = time.monotonic()
        self._window_bytes = 0
        self.url = url
        self.status = response.status
        self.headers = response.headers
        self.length = response.length

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def readinto(self, into: memoryview) -> int:
        """Some bytes, as soon as there are any; 0 at the end. Raises TimeoutError if they stall,
        ConnectionError if the connection breaks before the end that was announced."""
        try:
            count = self._readinto(into)
        except http.client.HTTPException as error:
            raise ConnectionError(f"{self.url}: {error!r}") from error
        except ValueError as error:  # closed under us
            raise ConnectionError(f"{self.url}: {error}") from error
        now = time.monotonic()
        self._window_bytes += count
        if now - self._window_began > self._pool.patience.stall_seconds:
            if count and self._window_bytes < _DRIP_BYTES:
                raise TimeoutError(f"{self.url} gives less than {_DRIP_BYTES} bytes in that time")
            self._window_began, self._window_bytes = now, 0
        return count

    def _readinto(self, into: memoryview) -> int:
        if self._left is None:
            piece = self._response.read1(len(into))
            into[: len(piece)] = piece
            return len(piece)
        if self._left == 0:
            return 0
        # One receive, however little it gives: HTTPResponse.readinto waits until all of `into` is full.
        file = self._response.fp
        assert isinstance(file, io.BufferedReader)
        count = file.readinto1(into[: self._left])
        if not count:
            raise ConnectionError(f"{self.url}: the connection ended {self._left} bytes too early")
        self._left -= count
        return count

    def read(self, limit_bytes: int) -> bytes:
        """The whole body. Raises RegistryError if it is longer than that."""
        content = bytearray()
        buffer = memoryview(bytearray(min(PIECE_BYTES, limit_bytes + 1)))
        while count := self.readinto(buffer):
            content += buffer[:count]
            if len(content) > limit_bytes:
                raise RegistryError(f"{self.url} answers with more than {limit_bytes} bytes")
        return bytes(content)

    def abort(self) -> None:
        """Ends a read that another thread waits in."""
        sock = self._connection.sock
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        at_end = self._left == 0 or (self._left is None and self._response.isclosed())
        if at_end and not self._response.will_close:
            self._response.close()
            self._pool.give_back(self.url, self._connection)
        else:
            self._response.close()
            self._pool.drop(self._connection)


class Connections:
    """Connections to any host, kept open between requests. For many threads."""

    def __init__(self, patience: Patience, *, ca_files: Mapping[str, Path] | None = None) -> None:
        """`ca_files` are by host with port, as in the configuration."""
        self.patience = patience
        self._ca_files = dict(ca_files or {})
        self._lock = threading.Lock()
        self._idle: dict[tuple[str, str, int], list[tuple[float, http.client.HTTPConnection]]] = defaultdict(
            list
        )
        self._open: set[http.client.HTTPConnection] = set()
        self._closed = False
        self.met: set[tuple[str, str, int]] = set()  # who has answered us

    def request(self, method: str, url: Url, headers: Mapping[str, str], body: Body | None = None) -> Answer:
        """Sends one request and returns the answer, whatever its status.

        Raises OSError if the host cannot be reached or does not answer in time. A kept connection that the
        other side had closed meanwhile is replaced without a word.
        """
        while True:
            connection, kept = self._take(url)
            try:
                return self._exchange(connection, method, url, headers, body)
            except (ConnectionError, http.client.HTTPException) as error:
                self.drop(connection)
                if kept and not self._closed:
                    continue
                if isinstance(error, OSError):
                    raise
                raise ConnectionError(f"{url}: {error!r:.200}") from error
            except BaseException:
                self.drop(connection)
                raise

    def _exchange(
        self,
        connection: http.client.HTTPConnection,
        method: str,
        url: Url,
        headers: Mapping[str, str],
        body: Body | None,
    ) -> Answer:
        connection.putrequest(method, url.target, skip_accept_encoding=True)
        connection.putheader("User-Agent", f"rekindle/{__version__}")
        connection.putheader("Accept-Encoding", "identity")  # a digest is of the bytes as they are stored
        for name, value in headers.items():
            connection.putheader(name, value)
        if body is not None or method in {"POST", "PUT"}:
            connection.putheader("Content-Length", str(body.length if body else 0))
        try:
            connection.endheaders()
            if body is not None:
                body.send(connection)
        except (BrokenPipeError, ConnectionResetError):
            # Who refuses a body may say so and hang up before it has read all of it.
            with contextlib.suppress(OSError, http.client.HTTPException):
                response = connection.getresponse()
                response.will_close = True
                return Answer(self, connection, response, url)
            raise
        response = connection.getresponse()
        self.met.add(url.origin)
        return Answer(self, connection, response, url)

    def _take(self, url: Url) -> tuple[http.client.HTTPConnection, bool]:
        """A connection, and whether it is a kept one."""
        with self._lock:
            if self._closed:
                raise ConnectionAbortedError("all connections were closed")
            idle = self._idle[url.origin]
            while idle:
                since, connection = idle.pop()
                if time.monotonic() - since < _IDLE_SECONDS:
                    return connection, True
                self._open.discard(connection)
                connection.close()
        connection = self._connect(url)
        with self._lock:
            self._open.add(connection)
            if self._closed:
                connection.close()
                raise ConnectionAbortedError("all connections were closed")
        return connection, False

    def _connect(self, url: Url) -> http.client.HTTPConnection:
        proxy = _proxy(url)
        host, port = (proxy.host, proxy.port) if proxy else (url.host, url.port)
        connection: http.client.HTTPConnection
        if url.scheme == "https":
            connection = http.client.HTTPSConnection(
                host, port, timeout=self.patience.connect_seconds, context=self._tls(url)
            )
        else:
            connection = http.client.HTTPConnection(host, port, timeout=self.patience.connect_seconds)
        if proxy:  # for http as well: a tunnel sees no request
            connection.set_tunnel(url.host, url.port, proxy.headers)
        connection.connect()
        connection.sock.settimeout(self.patience.stall_seconds)
        return connection

    def _tls(self, url: Url) -> "ssl.SSLContext":  # type: ignore[name-defined]  # noqa: F821
        import ssl

        ca_file = self._ca_files.get(f"{url.host}:{url.port}") or self._ca_files.get(url.host)
        return ssl.create_default_context(cafile=ca_file)

    def give_back(self, url: Url, connection: http.client.HTTPConnection) -> None:
        with self._lock:
            if self._closed:
                connection.close()
            else:
                self._idle[url.origin].append((time.monotonic(), connection))

    def drop(self, connection: http.client.HTTPConnection) -> None:
        with self._lock:
            self._open.discard(connection)
        connection.close()

    def close(self) -> None:
        """Ends everything, also what other threads wait for."""
        with self._lock:
            self._closed = True
            connections = list(self._open)
            self._open.clear()
            self._idle.clear()
        for connection in connections:
            if connection.sock is not None:
                with contextlib.suppress(OSError):
                    connection.sock.shutdown(socket.SHUT_RDWR)
            connection.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Proxy:
    host: str
    port: int
    headers: dict[str, str]


def _proxy(url: Url) -> _Proxy | None:
    """The proxy that $HTTPS_PROXY, $HTTP_PROXY and $NO_PROXY ask for. Raises RegistryError."""
    if is_loopback(url.host) or urllib.request.proxy_bypass(f"{url.host}:{url.port}"):
        return None
    text = urllib.request.getproxies().get(url.scheme)
    if not text:
        return None
    parts = urllib.parse.urlsplit(text if "://" in text else f"http://{text}")
    if parts.scheme != "http" or not parts.hostname:
        raise RegistryError(
            f"the proxy for {url.scheme} cannot be used",
            cause="only proxies that are spoken to by http are",
            hint=f"look at ${url.scheme.upper()}_PROXY",
        )
    headers = {}
    if parts.username is not None:
        pair = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
        headers["Proxy-Authorization"] = "Basic " + base64.b64encode(pair.encode()).decode()
    return _Proxy(host=parts.hostname, port=parts.port or 8080, headers=headers)


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine's own."""
    return host == "localhost" or host.endswith(".localhost") or host == "::1" or host.startswith("127.")
