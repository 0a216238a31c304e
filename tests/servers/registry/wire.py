# SPDX-License-Identifier: Apache-2.0
"""How requests reach the simulator, and how its answers are sent: whole, slowly, in part, or not at all."""

import contextlib
import http.client
import http.server
import io
import os
import re
import socket
import socketserver
import struct
import sys
import threading
import time
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, urlsplit

if TYPE_CHECKING:
    from tests.servers.registry.simulator import Registry

Content = bytes | bytearray | memoryview

_NAME = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*"
_PIECE_BYTES = 1 << 20
_SETTLE_SECONDS = 10.0


class Kind(StrEnum):
    """What a request is about."""

    BASE = "base"
    MANIFEST = "manifest"
    BLOB = "blob"
    UPLOAD = "upload"
    TAGS = "tags"
    REFERRERS = "referrers"
    TOKEN = "token"
    OTHER = "other"


_ROUTES = (
    (Kind.BASE, re.compile(r"/v2/?")),
    (Kind.TOKEN, re.compile(r"/token")),
    (Kind.UPLOAD, re.compile(rf"/v2/({_NAME})/blobs/uploads(?:/([^/]*))?")),
    (Kind.BLOB, re.compile(rf"/v2/({_NAME})/blobs/([^/]+)")),
    (Kind.MANIFEST, re.compile(rf"/v2/({_NAME})/manifests/([^/]+)")),
    (Kind.TAGS, re.compile(rf"/v2/({_NAME})/tags/list")),
    (Kind.REFERRERS, re.compile(rf"/v2/({_NAME})/referrers/([^/]+)")),
)


@dataclass(slots=True, kw_only=True, eq=False)
class Request:
    """One request, as it came and as it was answered.

    `reference` is the tag or digest in the path; of an upload it is the digest in the query, which POSTs and
    PATCHes of sessions do not have. Header names are in lower case. `served` is what a misbehaviour puts in
    the place of the content that was asked for.
    """

    registry: "Registry" = field(repr=False)
    method: str
    path: str
    query_string: str = field(repr=False)
    query: dict[str, str]
    headers: dict[str, str] = field(repr=False)
    kind: Kind
    repository: str
    reference: str
    session: str
    elsewhere: bool
    stream: io.BufferedIOBase = field(repr=False)
    served: Content | None = field(default=None, repr=False)
    body_bytes: int = 0
    sent_bytes: int = 0
    status: int | None = None  # None: no answer yet, or the client went away before it
    started: float = field(default_factory=time.monotonic, repr=False)
    ended: float | None = field(default=None, repr=False)
    _body: bytearray | None = field(default=None, repr=False)

    def body(self) -> bytearray:
        """What the client sent, all of it."""
        if self._body is None:
            self._body = self.read(None)
        return self._body

    def read(self, limit: int | None) -> bytearray:
        """At most `limit` bytes of what the client sends. Read it once: `body` is for the usual case."""
        if self.headers.get("transfer-encoding", "").lower() == "chunked":
            return self._read_chunks(limit)
        length = int(self.headers.get("content-length", 0))
        buffer = bytearray(length if limit is None else min(length, limit))
        self._fill(memoryview(buffer))
        return buffer

    def _read_chunks(self, limit: int | None) -> bytearray:
        buffer = bytearray()
        while size := int(self.stream.readline().partition(b";")[0] or b"0", 16):
            chunk = bytearray(size + 2)
            self._fill(memoryview(chunk))
            buffer += memoryview(chunk)[:-2]
            if limit is not None and len(buffer) >= limit:
                return buffer
        while self.stream.readline().strip():
            pass
        return buffer

    def _fill(self, view: memoryview) -> None:
        done = 0
        while done < len(view):
            got = self.stream.readinto(view[done : done + _PIECE_BYTES])
            if not got:
                raise ConnectionAbortedError("the client went away")
            done += got
            self.body_bytes += got
            self.registry.pace(self.started, self.body_bytes, self.registry.rate_bytes_per_second)


class Ending(Enum):
    """What becomes of a connection after the answer, or what there is of it."""

    KEEP = "keep"
    CLOSE = "close"
    RESET = "reset"
    STALL = "stall"


@dataclass(slots=True, kw_only=True)
class Answer:
    """What is sent, and how. Content-Length is that of the body, unless the headers say something else."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: Content = b""
    chunked: bool = False  # without Content-Length
    bytes_per_second: float | None = None
    cut_after: int | None = None  # bytes of the body, then `ending`; -1: not even the headers
    ending: Ending = Ending.KEEP


class Server(socketserver.ThreadingTCPServer):
    """Listens on loopback from the beginning until `stop_listening`; `server_close` waits for its threads."""

    allow_reuse_address = True
    daemon_threads = False
    block_on_close = True
    request_queue_size = 256

    def __init__(self, registry: "Registry", port: int, *, elsewhere: bool) -> None:
        self.registry, self.elsewhere = registry, elsewhere
        self._connections: set[socket.socket] = set()
        self.stalling: set[socket.socket] = set()
        super().__init__(("127.0.0.1", port), _Handler)
        self.port = int(self.server_address[1])
        self._thread = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def stop_listening(self) -> None:
        self.shutdown()
        self._thread.join()
        self.socket.close()
        for connection in list(self._connections):
            with contextlib.suppress(OSError):  # it may be gone by now
                connection.shutdown(socket.SHUT_RDWR)

    def settle(self) -> None:
        """Waits until all is served that was sent by clients which are gone by now; not for what stalls."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=_SETTLE_SECONDS) as last:
            last.shutdown(socket.SHUT_WR)
            last.recv(1)  # it has been accepted, and so have all before it, since that goes by turns
        end = time.monotonic() + _SETTLE_SECONDS
        while self._connections - self.stalling:
            assert time.monotonic() < end, "a client holds a connection open"
            time.sleep(0.001)

    def get_request(self) -> tuple[socket.socket, object]:
        connection, address = super().get_request()
        self._connections.add(connection)
        return connection, address

    def shutdown_request(self, request: object) -> None:
        assert isinstance(request, socket.socket)
        self._connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: object, client_address: object) -> None:
        problem = sys.exception()
        if problem and not isinstance(problem, ConnectionError):  # clients may go when they like
            self.registry.fault(problem)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def _serve(self) -> None:
        registry, target = self.server.registry, urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        query = dict(parse_qsl(target.query, keep_blank_values=True))
        kind, repository, reference = Kind.OTHER, "", ""
        for kind_, pattern in _ROUTES:
            if match := pattern.fullmatch(target.path):
                kind, (repository, reference, *_) = kind_, (*match.groups(""), "", "")
                break
        session = reference if kind is Kind.UPLOAD else ""
        request = Request(
            registry=registry,
            method=self.command,
            path=target.path,
            query_string=target.query,
            query=query,
            headers=headers,
            kind=kind,
            repository=repository,
            reference=query.get("digest") or query.get("mount", "") if kind is Kind.UPLOAD else reference,
            session=session,
            elsewhere=self.server.elsewhere,
            stream=self.rfile,
        )
        registry.requests.append(request)
        try:
            with registry.in_work():
                self._send(request, registry.answer(request))
        finally:
            request.ended = time.monotonic()

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = _serve  # noqa: N815 - http.server's names

    def _send(self, request: Request, answer: Answer) -> None:
        if answer.cut_after == -1:
            return self._end(request, answer.ending)
        if answer.ending is Ending.KEEP:
            request.body()  # what was not asked for is in the way of the next request
        body = memoryview(answer.body)
        headers = {"Docker-Distribution-Api-Version": "registry/2.0", **answer.headers}
        if answer.chunked:
            headers["Transfer-Encoding"] = "chunked"
        elif answer.status != 204:
            headers.setdefault("Content-Length", str(len(body)))
        lines = [f"HTTP/1.1 {answer.status} {http.client.responses.get(answer.status, '')}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        request.status = answer.status
        sent = "\r\n".join([*lines, "\r\n"]).encode("latin-1")
        if request.method == "HEAD" or answer.status == 204:
            body = memoryview(b"")
        body = body[: answer.cut_after]
        if len(body) <= 1 << 14 and not (answer.chunked or answer.bytes_per_second):
            self.connection.sendall(sent + body)
            request.sent_bytes = len(body)
        else:
            self.connection.sendall(sent)
            self._send_body(request, answer, body)
        if answer.chunked and request.method != "HEAD" and answer.ending is Ending.KEEP:
            self.connection.sendall(b"0\r\n\r\n")
        if headers.get("Connection", "").lower() == "close":
            self.close_connection = True
        return self._end(request, answer.ending)

    def _send_body(self, request: Request, answer: Answer, body: memoryview) -> None:
        rate = answer.bytes_per_second or self.server.registry.rate_bytes_per_second
        step = max(1, min(_PIECE_BYTES, int(rate / 20))) if rate else _PIECE_BYTES
        started = time.monotonic()
        for start in range(0, len(body), step):
            piece = body[start : start + step]
            if answer.chunked:
                self.connection.sendall(b"%x\r\n" % len(piece))
            self.connection.sendall(piece)
            if answer.chunked:
                self.connection.sendall(b"\r\n")
            request.sent_bytes += len(piece)
            self.server.registry.pace(started, request.sent_bytes, rate)

    def _end(self, request: Request, ending: Ending) -> None:
        match ending:
            case Ending.KEEP:
                return
            case Ending.STALL:
                self.server.stalling.add(self.connection)
                self.server.registry.wait()
            case Ending.RESET:
                linger = struct.pack("ii", 1, 0)  # close at once: the other side gets an RST
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                os.close(self.connection.detach())
            case Ending.CLOSE:
                pass
        self.close_connection = True

    def log_message(self, *words: object) -> None:
        pass
