# SPDX-License-Identifier: Apache-2.0
"""HTTP/1.1 connections to registries: pooled, streamed both ways, each wait with a deadline."""

import base64
import contextlib
import functools
import http.client
import io
import re
import socket
import threading
import time
import urllib.parse
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self

from rekindle import __version__
from rekindle.config import Patience
from rekindle.errors import RegistryError, UsageError

if TYPE_CHECKING:
    import ssl

PIECE_BYTES = 1 << 20  # received or sent at once: more is no faster, 8 KiB less than half as fast
_IDLE_SECONDS = 20.0  # registries and what stands before them drop idle connections after 30 to 60 s
_DRIP_BYTES = 16 << 10  # whoever sends less than this within the stall time has stalled
_FRAME_BYTES = 256 << 10  # of headers; and of what stands around one piece of a body in chunks
_DRAIN_BYTES = 8 << 10  # of what nobody reads of an answer: to receive it is faster than to connect anew
_GRACE_BYTES = 256 << 20  # a registry hashes and moves what it got before it answers
_LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_HOST = re.compile(rf"{_LABEL}(?:\.{_LABEL})*\.?|[0-9a-f.]*:[0-9a-f:.]*")
_HOST_LIMIT = 253
_LOGIN = re.compile(r"^([a-zA-Z][a-zA-Z0-9+.-]*://)?.*@", re.DOTALL)
_LOOPBACK = re.compile(r"(?:.*\.)?localhost|::1|127(?:\.[0-9]{1,3}){3}")


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
        host = parts.hostname or ""
        # Names that no resolver would take are refused here: there, they raise errors of all kinds.
        if (
            parts.scheme not in {"http", "https"}
            or "@" in parts.netloc
            or len(host) > _HOST_LIMIT
            or not _HOST.fullmatch(host)
            or parts.port == 0
        ):
            raise ValueError(f"no http or https URL: {without_login(text)[:200]!r}")
        target = urllib.parse.quote((parts.path or "/"), safe="/%:@!$&'()*+,;=~-._")
        if parts.query:
            target += "?" + urllib.parse.quote(parts.query, safe="/%:@!$&'()*+,;=?~-._")
        port = parts.port or (443 if parts.scheme == "https" else 80)
        return cls(scheme=parts.scheme, host=host, port=port, target=target)

    @property
    def origin(self) -> tuple[str, str, int]:
        """What must be the same for credentials to be sent along."""
        return self.scheme, self.host, self.port

    def __str__(self) -> str:
        """Without the query, which may be a credential: so are signed links."""
        return f"{self.scheme}://{self.authority}{self.target.partition('?')[0]}"

    @property
    def authority(self) -> str:
        """Host and port."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Send(Protocol):
    """Sends a piece of a body."""

    def __call__(self, piece: bytes | memoryview, /) -> None: ...


class Body(Protocol):
    """What is sent with a request, `length` bytes; asked anew for every try."""

    @property
    def length(self) -> int:
        """Bytes."""

    @property
    def is_repeatable(self) -> bool:
        """Whether it may be sent to the same place again, if it broke midway. docker-registry appends what
        comes then to what it has of an upload already."""

    def send(self, send: Send) -> None:
        """Sends all of it."""


class _Pace:
    """How long a connection has made us wait, and what came of it.

    Only time in which we waited for the other side counts: we may read slowly for reasons of our own.
    """

    def __init__(self, sock: socket.socket, seconds: float, *, grace: float = 0.0) -> None:
        """`grace` is time that the first bytes may take besides."""
        self._sock = sock
        self._seconds = seconds
        self._left = seconds + grace
        self._bytes = 0

    def wait(self, move: Callable[[], int]) -> int:
        """What `move` returns, the count of bytes that it moved. Raises TimeoutError."""
        if self._left <= 0:
            if self._bytes < _DRIP_BYTES:
                raise TimeoutError(f"less than {_DRIP_BYTES} bytes in {self._seconds} s")
            self._left, self._bytes = self._seconds, 0
        self._sock.settimeout(self._left)
        began = time.monotonic()
        count = move()
        self._left -= time.monotonic() - began
        self._bytes += count
        return count


class _Receiver(io.RawIOBase):
    """What comes over a connection, at a pace that may be waited for.

    http.client reads header after header and chunk after chunk before it returns, each with a timeout of its
    own: here, all of them together have one, and a bound.
    """

    def __init__(self, raw: io.RawIOBase, pace: _Pace) -> None:
        super().__init__()
        self._raw = raw
        self._pace = pace
        self.room = _FRAME_BYTES  # how much may come yet

    def readable(self) -> bool:
        return True

    def readinto(self, into: object, /) -> int:
        if self.room <= 0:
            raise ConnectionError("headers, or what stands between chunks, without end")
        count = self._pace.wait(lambda: self._raw.readinto(into) or 0)  # type: ignore[arg-type]
        self.room -= count
        return count

    def close(self) -> None:
        super().close()
        self._raw.close()


class _Response(http.client.HTTPResponse):
    """A response that is received by way of a `_Receiver`."""

    def __init__(self, pace: _Pace, sock: socket.socket, *args: object, **options: object) -> None:
        super().__init__(sock, *args, **options)  # type: ignore[arg-type]
        self.fp.close()
        self.receiver = _Receiver(sock.makefile("rb", buffering=0), pace)
        self.fp = io.BufferedReader(self.receiver)


class Answer:
    """A response whose body has yet to be read. Left unread, its connection is not used again.

    Belongs to one thread; only `abort` is for others.
    """

    def __init__(
        self,
        pool: "Connections",
        connection: http.client.HTTPConnection,
        sock: socket.socket,
        response: _Response,
        url: Url,
    ) -> None:
        self._pool = pool
        self._connection = connection
        self._sock = sock  # the connection forgets it if the response says that it will be closed
        self._response = response
        self._left = response.length  # None for a body in chunks, or up to the connection's end
        self._lock = threading.Lock()
        self._closed = False
        self._broken = False
        if self._left is not None:
            response.receiver.room = self._left
        self.url = url
        self.status = response.status
        self.headers = response.headers
        self.length = response.length
        self.giver: object = None  # who was asked for it, if whoever asked takes note of that

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def readinto(self, into: memoryview) -> int:
        """Some bytes, as soon as there are any; 0 at the end. Raises TimeoutError if they stall,
        ConnectionError if the connection breaks before the end that was announced."""
        try:
            return self._readinto(into)
        except (http.client.HTTPException, ValueError) as error:  # also chunks of a length that is none
            self._broken = True
            raise ConnectionError(f"{self.url}: {error!r:.200}") from error
        except TimeoutError as error:
            self._broken = True
            raise TimeoutError(f"{self.url} stalls: {error}") from error
        except BaseException:
            self._broken = True
            raise

    def _readinto(self, into: memoryview) -> int:
        if self._left is None:
            self._response.receiver.room = len(into) + _FRAME_BYTES
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
        """Ends a read that another thread waits in. Without effect once it is closed: by then, the
        connection may serve somebody else."""
        with self._lock:
            if not self._closed:
                self._broken = True
                _shut(self._sock)

    def close(self) -> None:
        """Gives the connection back, if it can be used again. Idempotent."""
        if self._left is not None and self._left <= _DRAIN_BYTES and self._is_whole():
            with contextlib.suppress(OSError):
                while self.readinto(memoryview(bytearray(_DRAIN_BYTES))):
                    pass
        with self._lock:
            if self._closed:
                return
            self._closed = True
        at_end = self._left == 0 or (self._left is None and self._response.isclosed())
        again = at_end and self._is_whole()
        self._response.close()
        if again:
            self._pool.give_back(self.url, self._connection)
        else:
            self._pool.drop(self._connection)

    def _is_whole(self) -> bool:
        return not self._broken and not self._response.will_close


class Connections:
    """Connections to any host, kept open between requests. For many threads."""

    def __init__(self, patience: Patience, *, ca_files: Mapping[str, Path] | None = None) -> None:
        """`ca_files` are by host with port, as in the configuration."""
        self.patience = patience
        self._ca_files = dict(ca_files or {})
        self._contexts: dict[Path | None, ssl.SSLContext] = {}
        self._lock = threading.Lock()
        self._idle: dict[tuple[str, str, int], list[tuple[float, http.client.HTTPConnection]]] = defaultdict(
            list
        )
        self._open: dict[http.client.HTTPConnection, socket.socket] = {}
        self._dialed: set[socket.socket] = set()
        self._closed = False
        self.met: set[tuple[str, str, int]] = set()  # who has answered us

    def request(self, method: str, url: Url, headers: Mapping[str, str], body: Body | None = None) -> Answer:
        """Sends one request and returns the answer, whatever its status.

        Raises OSError if the host cannot be reached or does not answer in time. A kept connection that the
        other side had closed meanwhile is replaced without a word.
        """
        fresh = body is not None and not body.is_repeatable
        while True:
            connection, sock, kept = self._take(url, fresh=fresh)
            try:
                return self._exchange(connection, sock, method, url, headers, body)
            except (ConnectionError, http.client.HTTPException) as error:
                self.drop(connection)
                if kept and not self._closed:
                    fresh = True
                    continue
                if isinstance(error, OSError):
                    raise
                raise ConnectionError(f"{error!r:.200}") from error
            except BaseException:
                self.drop(connection)
                raise

    def _exchange(
        self,
        connection: http.client.HTTPConnection,
        sock: socket.socket,
        method: str,
        url: Url,
        headers: Mapping[str, str],
        body: Body | None,
    ) -> Answer:
        stall = self.patience.stall_seconds
        sock.settimeout(stall)
        length = body.length if body is not None else 0
        connection.putrequest(method, url.target, skip_accept_encoding=True)
        connection.putheader("User-Agent", f"rekindle/{__version__}")
        connection.putheader("Accept-Encoding", "identity")  # a digest is of the bytes as they are stored
        for name, value in headers.items():
            connection.putheader(name, value)
        if body is not None or method in {"POST", "PUT"}:
            connection.putheader("Content-Length", str(length))
        try:
            connection.endheaders()
            if body is not None:
                body.send(functools.partial(_send, sock, _Pace(sock, stall)))
        except OSError:
            # Who refuses a body may say so, and read no more or hang up before all of it has gone.
            with contextlib.suppress(OSError, http.client.HTTPException):
                response = _response(connection, _Pace(sock, min(1.0, stall)))
                response.will_close = True
                return Answer(self, connection, sock, response, url)
            raise
        response = _response(connection, _Pace(sock, stall, grace=stall * (length // _GRACE_BYTES)))
        self.met.add(url.origin)
        return Answer(self, connection, sock, response, url)

    def _take(self, url: Url, *, fresh: bool) -> tuple[http.client.HTTPConnection, socket.socket, bool]:
        """A connection with its socket, and whether it is a kept one."""
        with self._lock:
            if self._closed:
                raise ConnectionAbortedError("all connections were closed")
            idle = self._idle[url.origin]
            while idle and not fresh:
                since, connection = idle.pop()
                if time.monotonic() - since < _IDLE_SECONDS:
                    return connection, self._open[connection], True
                del self._open[connection]
                connection.close()
        connection = self._connect(url)
        sock = connection.sock
        with self._lock:
            if self._closed:
                connection.close()
                raise ConnectionAbortedError("all connections were closed")
            self._open[connection] = sock
        return connection, sock, False

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
        connection._create_connection = self._dial  # type: ignore[attr-defined]
        if proxy:  # for http as well: a tunnel sees no request
            connection.set_tunnel(url.host, url.port, proxy.headers)
        try:
            connection.connect()
        except BaseException:
            connection.close()
            raise
        return connection

    def _dial(self, address: tuple[str, int], timeout: float, *_source: object) -> socket.socket:
        """As `socket.create_connection`; but all of a host's addresses together have that long, and `close`
        ends the wait."""
        host, port = address
        deadline = time.monotonic() + timeout
        places = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        problem: OSError = OSError(f"{host} has no address")
        for number, (family, kind, protocol, _, place) in enumerate(places):
            sock = socket.socket(family, kind, protocol)
            try:
                with self._lock:
                    if self._closed:
                        raise ConnectionAbortedError("all connections were closed")
                    self._dialed.add(sock)
                sock.settimeout(max(0.1, (deadline - time.monotonic()) / (len(places) - number)))
                sock.connect(place)
                sock.settimeout(timeout)
                return sock
            except OSError as error:
                problem = error
                sock.close()
            except BaseException:
                sock.close()
                raise
            finally:
                with self._lock:
                    self._dialed.discard(sock)
        raise problem

    def _tls(self, url: Url) -> "ssl.SSLContext":
        import ssl

        ca_file = self._ca_files.get(url.authority) or self._ca_files.get(url.host)
        with self._lock:  # to read all authorities takes longer than to connect
            if ca_file not in self._contexts:
                try:
                    self._contexts[ca_file] = ssl.create_default_context(cafile=ca_file)
                except OSError as error:  # SSLError is one
                    raise UsageError(
                        f"the ca_file {ca_file} cannot be used",
                        cause=str(error),
                        hint=f'the configuration names it for [registry."{url.authority}"]',
                    ) from None
            return self._contexts[ca_file]

    def give_back(self, url: Url, connection: http.client.HTTPConnection) -> None:
        with self._lock:
            idle = self._idle[url.origin]
            if not self._closed and len(idle) < self.patience.jobs:
                idle.append((time.monotonic(), connection))
                return
        self.drop(connection)

    def drop(self, connection: http.client.HTTPConnection) -> None:
        with self._lock:
            self._open.pop(connection, None)
        connection.close()

    def close(self) -> None:
        """Ends everything, also what other threads wait for."""
        with self._lock:
            self._closed = True
            idle = [connection for each in self._idle.values() for _, connection in each]
            self._idle.clear()
            for connection in idle:
                self._open.pop(connection).close()
                connection.close()
            # Their threads close them: one who closes a socket under another gives its number away.
            for sock in (*self._open.values(), *self._dialed):
                _shut(sock)


def _response(connection: http.client.HTTPConnection, pace: _Pace) -> _Response:
    connection.response_class = functools.partial(_Response, pace)  # type: ignore[assignment]
    response = connection.getresponse()
    assert isinstance(response, _Response)
    return response


def _send(sock: socket.socket, pace: _Pace, piece: bytes | memoryview, /) -> None:
    """As `sendall`, which would want all of a piece to go within one timeout."""
    left = memoryview(piece)
    while left:
        left = left[pace.wait(functools.partial(sock.send, left)) :]


def _shut(sock: socket.socket) -> None:
    """Ends what other threads wait for on a connection."""
    # Not SSLSocket's own: it forgets TLS first, and what another thread sends then would go in plain text.
    with contextlib.suppress(OSError):
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Proxy:
    host: str
    port: int
    headers: dict[str, str]


def _proxy(url: Url) -> _Proxy | None:
    """The proxy that $HTTPS_PROXY, $HTTP_PROXY and $NO_PROXY ask for. Raises RegistryError."""
    if is_loopback(url.host) or urllib.request.proxy_bypass(url.authority):
        return None
    text = urllib.request.getproxies().get(url.scheme)
    if not text:
        return None
    try:
        parts = urllib.parse.urlsplit(text if "://" in text else f"http://{text}")
        if parts.scheme != "http" or not _HOST.fullmatch(parts.hostname or ""):
            raise ValueError("only proxies that are spoken to by http are")
        port = parts.port or 8080
    except ValueError as error:
        raise RegistryError(
            f"the proxy for {url.scheme} cannot be used",
            cause=str(error),
            hint=f"look at ${url.scheme.upper()}_PROXY",
        ) from None
    headers = {}
    if parts.username is not None:
        pair = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
        headers["Proxy-Authorization"] = "Basic " + base64.b64encode(pair.encode()).decode()
    return _Proxy(host=parts.hostname or "", port=port, headers=headers)


def without_login(text: str) -> str:
    """A URL, or what should be one, without user and password."""
    return _LOGIN.sub(r"\1…@", text, count=1)


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine's own."""
    return _LOOPBACK.fullmatch(host) is not None
