# SPDX-License-Identifier: Apache-2.0
"""The HTTP server of `rekindle dashboard`.

    GET  /, /page.js, /page.css      the page, which holds no data
    GET  /api/state                  what `cli/_dashboard_state.py` gathers
    POST /api/wake, /api/hibernate, /api/stop     {"name": NAME}; answers {"status", "output"} of the command

It listens on loopback only. Other users of the machine, and pages of other sites in the same browser, reach
it there, too. So everything below /api needs the token of the printed address, as `Authorization: Bearer`,
which a browser never adds by itself. The token is in the address's fragment, which browsers do not send. A
request whose Host is not ours is refused, since a name of another site can be bound to 127.0.0.1.
"""

import hmac
import json
import secrets
import sys
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

from cli._dashboard_state import DashboardState
from rekindle import replicas
from rekindle.errors import NotFoundError
from rekindle.fields import JSON
from rekindle.home import Home
from rekindle.run import run

ACTIONS = frozenset({"wake", "hibernate", "stop"})
_FILES = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_BODY_LIMIT_BYTES = 4096
_IDLE_SECONDS = 30.0
_ACTION_SECONDS = 600.0


class DashboardServer(ThreadingHTTPServer):
    """Serves the page of a home on a port of loopback; 0 for any. Raises OSError if it is taken."""

    daemon_threads = True

    def __init__(self, home: Home, port: int) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.home, self.state = home, DashboardState(home)
        self.token = secrets.token_urlsafe(32)
        self.hosts = {f"{name}:{self.server_port}" for name in ("127.0.0.1", "localhost")}

    @property
    def address(self) -> str:
        """The address for the browser, with the token."""
        return f"http://127.0.0.1:{self.server_port}/#{self.token}"


class _RefusedError(Exception):
    def __init__(self, status: HTTPStatus, text: str) -> None:
        super().__init__(text)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    server: DashboardServer
    protocol_version = "HTTP/1.1"
    server_version = "rekindle"
    sys_version = ""
    timeout: ClassVar[float] = _IDLE_SECONDS

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def log_message(self, *_: object) -> None:
        """Write nothing: a page that asks every two seconds would fill a terminal."""

    def _answer(self, handle: Callable[[], tuple[bytes, str]]) -> None:
        status = HTTPStatus.OK
        try:
            if self.headers.get("Host") not in self.server.hosts:
                raise _RefusedError(HTTPStatus.MISDIRECTED_REQUEST, "this host is not served here")
            content, kind = handle()
        except _RefusedError as refused:
            status = refused.status
            content, kind = _json({"error": str(refused)})
            self.close_connection = True  # its body may not have been read
        self.send_response(status)
        for name, value in {**_HEADERS, "Content-Type": kind, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def _get(self) -> tuple[bytes, str]:
        if found := _FILES.get(self.path):
            name, kind = found
            return (Path(__file__).parent / "dashboard_files" / name).read_bytes(), kind
        if self.path == "/api/state":
            self._authorize()
            return _json(self.server.state.document())
        raise _RefusedError(HTTPStatus.NOT_FOUND, "there is nothing here")

    def _post(self) -> tuple[bytes, str]:
        action = self.path.removeprefix("/api/")
        if not self.path.startswith("/api/") or action not in ACTIONS:
            raise _RefusedError(HTTPStatus.NOT_FOUND, "there is nothing here")
        self._authorize()
        name = self._name()
        try:
            replicas.find(self.server.home, name)  # so that nothing else becomes a word of a command
        except NotFoundError as error:
            raise _RefusedError(HTTPStatus.NOT_FOUND, error.message) from None
        argv = [sys.executable, "-P", "-m", "rekindle", action, name]
        done = run(argv, timeout=_ACTION_SECONDS)
        return _json({"status": done.status, "output": done.output})

    def _authorize(self) -> None:
        """Refuse a request without the token, and one from a page of another site."""
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode(), self.server.token.encode()):
            raise _RefusedError(
                HTTPStatus.UNAUTHORIZED, "open the address that `rekindle dashboard` has printed"
            )
        origin = self.headers.get("Origin")
        if origin is not None and origin.removeprefix("http://") not in self.server.hosts:
            raise _RefusedError(HTTPStatus.FORBIDDEN, "a page of another site may not ask this")
        if self.headers.get("Sec-Fetch-Site", "same-origin") != "same-origin":
            raise _RefusedError(HTTPStatus.FORBIDDEN, "a page of another site may not ask this")

    def _name(self) -> str:
        length = self.headers.get("Content-Length", "")
        if self.headers.get("Content-Type") != "application/json":
            raise _RefusedError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "not JSON")
        if not length.isdecimal() or int(length) > _BODY_LIMIT_BYTES:
            raise _RefusedError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "no length, or too long")
        try:
            match json.loads(self.rfile.read(int(length))):
                case {"name": str(name)}:
                    return name
        except ValueError:
            pass
        raise _RefusedError(HTTPStatus.BAD_REQUEST, "no name of a server")


def _json(document: JSON) -> tuple[bytes, str]:
    return json.dumps(document).encode(), "application/json"
