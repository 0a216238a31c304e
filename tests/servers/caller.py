# SPDX-License-Identifier: Apache-2.0
"""A server with a connection to a daemon: `caller.py PORT unix:PATH|tcp:HOST:PORT [BEHAVIOUR…]`.

    GET  /health     200
    POST /answer     the oracle's question
    GET  /call       asks the daemon, on a new connection if the old one is broken; how it went, as JSON

Behaviours: waits (a thread reads from a second connection, and makes another when it ends), also=unix:PATH
(there is another daemon, which accepts nothing), log=PATH (there is a log of datagrams).
"""

import http.server
import json
import os
import socket
import sys
import threading

PORT, DAEMON, BEHAVIOURS = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
ALSO = next((word.partition("=")[2] for word in BEHAVIOURS if word.startswith("also=")), "")
LOG = next((word.partition("=")[2] for word in BEHAVIOURS if word.startswith("log=")), "")


def connect(to: str = "") -> socket.socket:
    kind, _, place = (to or DAEMON).partition(":")
    if kind == "unix":
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(place)
        return sock
    host, _, port = place.rpartition(":")
    return socket.create_connection((host, int(port)))


def call(sock: socket.socket) -> str:
    """Ask on a connection; return the daemon's name, or how the connection is broken."""
    try:
        sock.sendall(b"?")
        return sock.recv(100).decode() or "EOF"
    except OSError as error:
        return type(error).__name__


def tell_log() -> list[str]:
    """Send to the log, as syslog(3) does: if that fails, connect again."""
    if not LOG:
        return []
    try:
        return [str(log.send(b"!"))]
    except OSError as error:
        log.connect(LOG)
        return [type(error).__name__, str(log.send(b"!"))]


def wait() -> None:
    while True:
        with connect() as sock:
            ends.append(sock.recv(100).decode() or "EOF")


ends: list[str] = []
connection = connect()
ours, theirs = socket.socketpair()  # which stays as it is
listener = socket.create_server(("127.0.0.1", 0))
inside = socket.create_connection(listener.getsockname())
accepted = listener.accept()[0]
assert call(connection)
other = connect(ALSO) if ALSO else None
log = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
if LOG:
    log.connect(LOG)
if "waits" in BEHAVIOURS:
    threading.Thread(target=wait, daemon=True).start()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        global connection
        if self.path == "/health":
            self.reply("ready")
            return
        found = [call(connection)]
        if found[0] in {"EOF", "BrokenPipeError", "ConnectionResetError"}:
            connection.close()
            connection = connect()
            found.append(call(connection))
        theirs.sendall(b"!")
        accepted.sendall(b"!")
        inner = [ours.recv(1).decode(), inside.recv(1).decode()]
        also = other.recv(1).decode() or "EOF" if other else ""
        self.reply(
            json.dumps({"calls": found, "inside": inner, "ends": ends, "also": also, "logged": tell_log()})
        )

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        self.reply(json.dumps({"answer": os.getpid(), "asked": body}))

    def reply(self, text: str) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        pass


http.server.ThreadingHTTPServer(("127.0.0.1", PORT), Handler).serve_forever()
