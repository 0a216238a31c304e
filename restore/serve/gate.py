# SPDX-License-Identifier: Apache-2.0
"""A gate before a server: pass on the requests of a connection that its guard allows, refuse the others.

Each request is parsed and written anew, so the server never sees bytes that the gate has read in another
way. Requests of a connection are handled one after the other, as uvicorn does. What RFC 9112 lets a
recipient repair is refused with status 400: bare line feeds, folded lines, both kinds of body length,
several lengths. Memory is bounded: 64 KiB for the head of a request, and the forwarder's buffers.

Pure: bytes go in, and bytes and the decision to close come out. h11 parses and writes HTTP/1.1.
"""

import re
from email.utils import formatdate
from typing import Protocol

import h11

HEAD_LIMIT_BYTES = 64 << 10
_INVALID = b"Invalid HTTP request received."
_UNAUTHORIZED_STATUS = 401
_TUNNEL_STATUS = 101

# What llhttp refuses in a head, too: control characters, bare CR or LF, folded lines.
_MALFORMED = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|(?<!\r)\n|\r(?!\n|\Z)|\r\n[ \t]")
_TARGET = re.compile(rb"/|\*\Z|[A-Za-z][A-Za-z0-9+.-]*://[^/?#]")
_LENGTH = re.compile(rb"[0-9]{1,18} *")
_METHODS = frozenset(
    b"GET HEAD POST PUT DELETE CONNECT OPTIONS TRACE PATCH QUERY "
    b"ACL BIND CHECKOUT COPY LINK LOCK M-SEARCH MERGE MKACTIVITY MKCALENDAR MKCOL MOVE NOTIFY PROPFIND "
    b"PROPPATCH PURGE REBIND REPORT SEARCH SOURCE SUBSCRIBE UNBIND UNLINK UNLOCK UNSUBSCRIBE".split()
)


class Guardian(Protocol):
    """Decides which requests are refused."""

    def refuses(self, method: bytes, target: bytes, headers: list[tuple[bytes, bytes]]) -> bool:
        """Tell whether to refuse a request."""


class _InvalidRequestError(Exception):
    """A request that is not passed on, with the status of the answer."""

    def __init__(self, status: int = 400) -> None:
        super().__init__()
        self.status = status


class _Exchange:
    """A request and its response: we are the server of `near`, and the client of `far`.

    `far` is None for a request that was refused.
    """

    def __init__(self, near: h11.Connection, far: h11.Connection | None) -> None:
        self.near = near
        self.far = far
        self.request_done = False
        self.response_begun = False
        self.response_done = False


class ApiKeyGate:
    """The gate of one connection. After each call, take `to_client` and `to_server`, then heed `is_over`."""

    def __init__(
        self, guard: Guardian | None, host: str, *, hides_key: bool = False, forwarded_for: str = ""
    ) -> None:
        """`host` is the value of the header Host for a request of HTTP/1.0 that has none.

        Without a guard, no request is refused. With `hides_key`, the server does not get the header
        Authorization: its memory may be saved. `forwarded_for` is the client's address, which is added to
        those in X-Forwarded-For.
        """
        self.to_client = bytearray()
        self.to_server = bytearray()
        self.is_over = False
        self._guard = guard
        self._host = host.encode()
        self._hides_key = hides_key
        self._forwarded_for = forwarded_for.encode()
        self._unread = bytearray()
        self._exchange: _Exchange | None = None
        self._is_tunnel = False

    @property
    def waiting_bytes(self) -> int:
        """Return the bytes of the client that wait for the end of an earlier response."""
        return len(self._unread)

    def from_client(self, content: bytes) -> None:
        """Take bytes from the client."""
        if self._is_tunnel:
            self.to_server += content
            return
        self._unread += content
        self._advance()

    def from_server(self, content: bytes) -> None:
        """Take bytes from the server; b"" at the end of its stream."""
        if self._is_tunnel:
            self.to_client += content
            return
        exchange = self._exchange
        if exchange is None or exchange.far is None or exchange.response_done:
            self.is_over = True  # it has ended, or speaks without being asked
            return
        try:
            exchange.far.receive_data(content)
            self._read_response(exchange, exchange.far)
        except h11.ProtocolError:
            self.is_over = True
            return
        self.is_over = self.is_over or not content
        if not self._is_tunnel:
            self._advance()

    def _advance(self) -> None:
        """Read what the client has sent, as far as it may be read now."""
        try:
            while not self.is_over:
                if self._exchange is None and not self._begin():
                    return
                assert self._exchange is not None
                if not self._exchange.request_done and not self._read_request(self._exchange):
                    return
                if not self._exchange.response_done:
                    return
                self._end(self._exchange)
        except _InvalidRequestError as error:
            self._answer_invalid(error.status)
        except h11.ProtocolError:
            self._answer_invalid(400)

    def _begin(self) -> bool:
        """Read the head of a request; return whether it is complete."""
        self._unread = self._unread.lstrip(b"\r\n")
        if not self._unread:
            return False
        end = self._unread.find(b"\r\n\r\n") + 4
        head = bytes(self._unread[:end] if end >= 4 else self._unread[:HEAD_LIMIT_BYTES])
        if not head[:1].isupper() or _MALFORMED.search(head):
            raise _InvalidRequestError
        if max(end, len(head)) > HEAD_LIMIT_BYTES or (end < 4 and len(self._unread) >= HEAD_LIMIT_BYTES):
            raise _InvalidRequestError(431)
        if end < 4:
            return False
        del self._unread[:end]
        near = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_LIMIT_BYTES)
        near.receive_data(head)
        request = near.next_event()
        if not isinstance(request, h11.Request):
            raise _InvalidRequestError
        _require_plain(head, request)
        self._exchange = _Exchange(near, None)
        self._decide(self._exchange, request, _padded_authorization(head))
        return True

    def _decide(self, exchange: _Exchange, request: h11.Request, is_padded: bool) -> None:
        """Refuse a request, or pass its head on."""
        headers = request.headers.raw_items()
        seen = [item for item in headers if item[0].lower() != b"authorization"] if is_padded else headers
        if self._guard is not None and self._guard.refuses(request.method, request.target, seen):
            self._refuse(exchange, request)
            return
        if request.method == b"CONNECT":
            raise _InvalidRequestError(405)
        if self._hides_key:
            headers = [item for item in headers if item[0].lower() != b"authorization"]
        if not any(name.lower() == b"host" for name, _ in headers):
            headers = [(b"Host", self._host), *headers]
        if self._forwarded_for:
            headers = _with_forwarded_for(headers, self._forwarded_for)
        exchange.far = h11.Connection(h11.CLIENT)
        passed = h11.Request(method=request.method, target=request.target, headers=headers)
        self._to_server(exchange.far.send(passed))

    def _refuse(self, exchange: _Exchange, request: h11.Request) -> None:
        body = b'{"error":"Unauthorized"}'
        headers = [
            ("Date", formatdate(usegmt=True)),
            ("Content-Length", str(len(body))),
            ("Content-Type", "application/json"),
        ]
        near = exchange.near
        self._to_client(
            near.send(h11.Response(status_code=_UNAUTHORIZED_STATUS, headers=headers, reason=b"Unauthorized"))
        )
        if request.method != b"HEAD":
            self._to_client(near.send(h11.Data(data=bytes(body))))
        self._to_client(near.send(h11.EndOfMessage()))
        exchange.response_begun = exchange.response_done = True

    def _read_request(self, exchange: _Exchange) -> bool:
        """Read the body of a request and pass it on, unless it was refused; return whether it is complete."""
        near, far = exchange.near, exchange.far
        while True:
            event = near.next_event()
            if event is h11.NEED_DATA:
                if not self._unread:
                    return False
                near.receive_data(bytes(self._unread))
                self._unread.clear()
            elif isinstance(event, h11.Data):
                if far is not None:
                    self._to_server(far.send(h11.Data(data=event.data)))
            else:
                break
        if not isinstance(event, h11.EndOfMessage):
            raise _InvalidRequestError
        if far is not None:
            self._to_server(far.send(h11.EndOfMessage()))  # without trailers
        self._unread[:0] = near.trailing_data[0]
        exchange.request_done = True
        return True

    def _read_response(self, exchange: _Exchange, far: h11.Connection) -> None:
        """Pass a response on, as far as it is there."""
        near = exchange.near
        body = bytearray()
        while True:
            event = far.next_event()
            if isinstance(event, h11.Data):
                body += event.data
                continue
            if body:  # of all chunks that came at once, one
                self._to_client(near.send(h11.Data(data=bytes(body))))
                body = bytearray()
            match event:
                case h11.InformationalResponse():
                    self._to_client(
                        near.send(
                            h11.InformationalResponse(
                                status_code=event.status_code,
                                headers=event.headers.raw_items(),
                                reason=event.reason,
                            )
                        )
                    )
                    if event.status_code == _TUNNEL_STATUS:
                        self._open_tunnel(far)
                        return
                case h11.Response():
                    exchange.response_begun = True
                    self._to_client(
                        near.send(
                            h11.Response(
                                status_code=event.status_code,
                                headers=event.headers.raw_items(),
                                reason=event.reason,
                            )
                        )
                    )
                case h11.EndOfMessage():
                    self._to_client(near.send(h11.EndOfMessage()))
                    exchange.response_done = True
                    return
                case _:
                    return

    def _open_tunnel(self, far: h11.Connection) -> None:
        """From now on, pass bytes on as they are: both ends agreed to speak another protocol."""
        self._is_tunnel = True
        self.to_client += far.trailing_data[0]
        self.to_server += self._unread
        self._unread.clear()

    def _end(self, exchange: _Exchange) -> None:
        """Make room for the next request, or end the connection if either end does not want one."""
        ends = [exchange.near.our_state, exchange.near.their_state]
        if exchange.far is not None:
            ends.append(exchange.far.their_state)
        if any(state is not h11.DONE for state in ends):
            self.is_over = True
        self._exchange = None

    def _answer_invalid(self, status: int) -> None:
        """Answer a request that is not passed on, unless it was answered in part, and end the connection."""
        self.is_over = True
        if self._exchange is None or not self._exchange.response_begun:
            head = [
                f"HTTP/1.1 {status} {_REASONS.get(status, 'Bad Request')}",
                f"Date: {formatdate(usegmt=True)}",
                "Content-Type: text/plain; charset=utf-8",
                f"Content-Length: {len(_INVALID)}",
                *("Connection: close", "", ""),
            ]
            self.to_client += "\r\n".join(head).encode() + _INVALID

    def _to_client(self, content: bytes | None) -> None:
        self.to_client += content or b""

    def _to_server(self, content: bytes | None) -> None:
        self.to_server += content or b""


_REASONS = {405: "Method Not Allowed", 431: "Request Header Fields Too Large", 501: "Not Implemented"}


class NewGate(Protocol):
    """Makes the gate of a new connection."""

    def __call__(self, *, forwarded_for: str = "") -> ApiKeyGate:
        """Return the gate, which tells the server this address of the client if it is one."""


def _with_forwarded_for(headers: list[tuple[bytes, bytes]], address: bytes) -> list[tuple[bytes, bytes]]:
    """Add an address to those that proxies before us have added, in one header, at the end."""
    known = [value for name, value in headers if name.lower() == b"x-forwarded-for"]
    rest = [item for item in headers if item[0].lower() != b"x-forwarded-for"]
    return [*rest, (b"X-Forwarded-For", b", ".join([*known, address]))]


def _require_plain(head: bytes, request: h11.Request) -> None:
    """Raise _InvalidRequestError for a request that another parser may understand in another way."""
    lengths = _values(head, b"content-length")
    encodings = _values(head, b"transfer-encoding")
    if (
        request.method not in _METHODS
        or request.http_version not in {b"1.0", b"1.1"}
        or not _TARGET.match(request.target)
        or len(lengths) + len(encodings) > 1
        or not all(_LENGTH.fullmatch(value) for value in lengths)
        or not all(value.lower() == b"chunked" for value in encodings)
        or (encodings and request.http_version == b"1.0")
    ):
        raise _InvalidRequestError


def _padded_authorization(head: bytes) -> bool:
    """Tell whether white space follows a value of Authorization. h11 drops it, but vLLM compares it."""
    return any(value != value.rstrip(b" \t") for value in _values(head, b"authorization"))


def _values(head: bytes, name: bytes) -> list[bytes]:
    """Return the values of a header as they are in a head, without white space before them."""
    found = []
    for line in head.split(b"\r\n")[1:]:
        key, colon, value = line.partition(b":")
        if colon and key.strip(b" \t").lower() == name:
            found.append(value.lstrip(b" \t"))
    return found
