# SPDX-License-Identifier: Apache-2.0
"""One connection to a host, by urllib3: directly or through a proxy, with our sockets beneath."""

import contextlib
import http.client
import socket
import ssl
from collections.abc import Callable, Iterable, Mapping

from urllib3.connection import HTTPConnection, HTTPSConnection, ProxyConfig
from urllib3.exceptions import HTTPError
from urllib3.util import Url as ProxyUrl
from urllib3.util.ssltransport import SSLTransport

from oci.registry.proxy import Proxy
from oci.registry.retry import ConnectTimeoutError
from oci.registry.sockets import FRAME_BYTES, Pace, PacedSocket, Watch, dial, shut
from oci.registry.url import Url

ContextFor = Callable[[str, int], ssl.SSLContext]
_CLIENT_ERRORS = (HTTPError, http.client.HTTPException)


class _Dialing:
    """Gives urllib3's connections our sockets."""

    dial: Callable[[], socket.socket]

    def _new_conn(self) -> socket.socket:
        return self.dial()


class _PlainConnection(_Dialing, HTTPConnection):
    """HTTP to a host, or to a proxy that forwards."""


class _TlsConnection(_Dialing, HTTPSConnection):
    """HTTP over TLS to a host, perhaps through a tunnel, or to a TLS proxy that forwards."""


class Connection:
    """An open connection for requests to one origin. Belongs to one thread; only `shut` is for others."""

    def __init__(self, inner: _PlainConnection | _TlsConnection, forwarder: Proxy | None) -> None:
        """`forwarder` is the proxy that gets the requests themselves, if there is one."""
        self._inner = inner
        self._forwarder = forwarder
        # urllib3 forgets the socket when a response announces that the connection will be closed.
        self._socket = _innermost(inner.sock)

    @classmethod
    def open(
        cls, url: Url, proxy: Proxy | None, context_for: ContextFor, *, seconds: float, watch: Watch
    ) -> "Connection":
        """Connect to the host of a URL, within about so many seconds. Raises OSError.

        A proxy forwards requests over http and gives a tunnel for https. See `dial` for `watch`.
        """
        inner = _unconnected(url, proxy, context_for)
        host, port = (proxy.host, proxy.port) if proxy else (url.host, url.port)
        inner.dial = lambda: dial(host, port, seconds, watch)
        if proxy is not None and url.scheme == "https":
            headers = {"Host": url.authority}
            if proxy.authorization:
                headers["Proxy-Authorization"] = proxy.authorization
            inner.set_tunnel(url.host, url.port, headers, scheme=proxy.scheme)
        with contextlib.ExitStack() as undo:
            undo.callback(inner.close)
            try:
                inner.connect()
            except TimeoutError as error:
                raise ConnectTimeoutError(str(error)) from error
            except _CLIENT_ERRORS as error:
                raise _as_os_error(error) from None
            connection = cls(inner, proxy if url.scheme == "http" else None)
            undo.pop_all()
            return connection

    def send(
        self,
        method: str,
        url: Url,
        headers: Mapping[str, str],
        body: Iterable[bytes | memoryview] | None,
        pace: Pace,
    ) -> None:
        """Send a request. Raises OSError, and ValueError for a header that is not valid."""
        self._socket.pace = pace
        target = url.target
        if self._forwarder is not None:
            target = url.absolute
            if self._forwarder.authorization:
                headers = {**headers, "Proxy-Authorization": self._forwarder.authorization}
        try:
            self._inner.request(
                method,
                target,
                body,  # type: ignore[arg-type]  # memoryviews are sent as well
                headers,
                preload_content=False,
                decode_content=False,
            )
        except _CLIENT_ERRORS as error:
            raise _as_os_error(error) from None
        except (ssl.SSLEOFError, ssl.SSLZeroReturnError) as error:
            raise ConnectionResetError(str(error)) from error

    def receive(self, pace: Pace) -> "HttpResponse":
        """Receive the head of the response. Raises OSError."""
        self._socket.pace = pace
        # Not by way of urllib3's own response: for decoding and redirects, which we do not need, it takes
        # 35 us more for each request, and a copy of each piece 5 % of the throughput.
        try:
            return HttpResponse(http.client.HTTPConnection.getresponse(self._inner), pace)
        except _CLIENT_ERRORS as error:
            raise _as_os_error(error) from None

    def shut(self) -> None:
        """End the wait of the thread that uses the connection."""
        shut(self._socket)

    def close(self) -> None:
        """Close it. A response that has not been read to its end stays readable."""
        self._inner.close()


class HttpResponse:
    """A response, whose body is read as it comes."""

    def __init__(self, response: http.client.HTTPResponse, pace: Pace) -> None:
        self._response = response
        self._pace = pace
        self.status = response.status
        self.headers = response.headers
        self.length = response.length  # None for a body in chunks, or up to the connection's end
        self.left = response.length
        if self.length is not None:
            pace.room_bytes = None

    @property
    def is_at_end(self) -> bool:
        """Whether all of the body has been read."""
        return self.left == 0 or (self.left is None and self._response.isclosed())

    @property
    def is_last(self) -> bool:
        """Whether the other side closes the connection after it."""
        return self._response.will_close

    def readinto(self, into: memoryview) -> int:
        """Read some bytes, as soon as there are any; 0 at the end.

        Raises TimeoutError if they stall, ConnectionError if they end too early or are malformed.
        """
        if self.left is None:
            return self._read_whole(into)
        if self.left == 0:
            return 0
        # One receive, however little it gives: HTTPResponse.readinto waits until all of `into` is full.
        count = self._response.fp.readinto1(into[: self.left])
        if not count:
            raise ConnectionError(f"the connection ended {self.left} bytes too early")
        self.left -= count
        return count

    def _read_whole(self, into: memoryview) -> int:
        self._pace.room_bytes = len(into) + FRAME_BYTES
        try:
            piece = self._response.read1(len(into))
        except _CLIENT_ERRORS as error:
            raise _as_os_error(error) from None
        into[: len(piece)] = piece
        return len(piece)

    def close(self) -> None:
        """End reading; the connection stays as it is."""
        self._response.close()


def _as_os_error(error: Exception) -> OSError:
    """Return an error of urllib3 or http.client as the OSError behind it, or as a ConnectionError."""
    for cause in (error, error.__cause__):  # an error of http.client may be an OSError itself
        if isinstance(cause, OSError):
            return cause
    return ConnectionError(f"{error!r:.200}")


def _innermost(sock: object) -> PacedSocket:
    """Return the socket below all TLS; within a tunnel of a TLS proxy, that is the one to the proxy."""
    if isinstance(sock, SSLTransport):
        sock = sock.socket
    assert isinstance(sock, PacedSocket)
    return sock


def _unconnected(url: Url, proxy: Proxy | None, context_for: ContextFor) -> _PlainConnection | _TlsConnection:
    first = proxy or url  # the host to connect to
    to_proxy = None
    config = None
    if proxy is not None:
        to_proxy = ProxyUrl(scheme=proxy.scheme, host=proxy.host, port=proxy.port)
        proxy_context = context_for(proxy.host, proxy.port) if proxy.scheme == "https" else None
        config = ProxyConfig(proxy_context, False, None, None)
    if "https" not in {url.scheme, first.scheme}:
        return _PlainConnection(first.host, first.port, proxy=to_proxy, proxy_config=config)
    verified = url if url.scheme == "https" else first
    context = context_for(verified.host, verified.port)
    return _TlsConnection(first.host, first.port, ssl_context=context, proxy=to_proxy, proxy_config=config)
