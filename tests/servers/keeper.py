# SPDX-License-Identifier: Apache-2.0
"""A server that keeps files outside its cell: `keeper.py PORT ROOM PLACE`.

It makes the directory PLACE, works in it, and keeps there a memory map of 64 KiB, a file that it reads, a
pipe and a unix socket. In the directory ROOM, which must exist, it keeps a lock, a log and a mapped library.

    GET  /health     200
    POST /answer     the oracle's question
    POST /write?N    writes N to the map, the log and a new file in PLACE
    POST /open?NAME  opens another log in ROOM, and keeps it
    GET  /check      what it finds in all of them, as JSON
"""

import fcntl
import http.server
import json
import mmap
import os
import socket
import sys
from pathlib import Path
from typing import TextIO
from urllib.parse import urlsplit

PORT, ROOM, PLACE = int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])

PLACE.mkdir(mode=0o750)
os.chdir(PLACE)
with open("map", "w+b") as file:
    file.truncate(1 << 16)
    memory = mmap.mmap(file.fileno(), 1 << 16)
Path("settings").write_text("kept")
os.mkfifo("pipe")
pipe = os.open("pipe", os.O_RDWR)
listener = socket.socket(socket.AF_UNIX)
listener.bind("socket")
listener.listen()
(ROOM / "library").write_bytes(b"code" * 4096)
with open(ROOM / "library", "rb") as source:
    library = mmap.mmap(source.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ)
lock = open(ROOM / "lock", "w")
fcntl.flock(lock, fcntl.LOCK_EX)
log = open(ROOM / "log", "a+")
print("began", file=log, flush=True)
others: list[TextIO] = []


def locked_again() -> bool:
    """Whether a process that opens the lock file by its name could take the lock."""
    with open(ROOM / "lock") as again:
        try:
            fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def connects() -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect("socket")
        return True


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/health":
            self.reply("ready")
            return
        log.seek(0)
        found = {
            "map": memory[:8].rstrip(b"\0").decode(),
            "map by name": Path(PLACE / "map").read_bytes()[:8].rstrip(b"\0").decode(),
            "log": log.read().split(),
            "log by name": (ROOM / "log").read_text().split(),
            "settings": Path("settings").read_text(),
            "new": sorted(path.name for path in PLACE.glob("new-*")),
            "directory": os.getcwd(),
            "locked": not locked_again(),
            "socket": connects(),
            "library": library[:4].decode(),
        }
        self.reply(json.dumps(found))

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        url = urlsplit(self.path)
        if url.path == "/write":
            memory[:8] = url.query.encode().ljust(8, b"\0")
            print(url.query, file=log, flush=True)
            Path(f"new-{url.query}").touch()
        if url.path == "/open":
            others.append(open(ROOM / url.query, "w"))
            print("opened", file=others[-1], flush=True)
        self.reply(json.dumps({"answer": 42, "asked": body}))

    def reply(self, text: str) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        pass


http.server.ThreadingHTTPServer(("127.0.0.1", PORT), Handler).serve_forever()
