# SPDX-License-Identifier: Apache-2.0
"""A server that has nothing to lose: `mule.py [BEHAVIOUR…] PORT`.

    GET  /health            200 once it is ready
    GET  /facts             its surroundings, as JSON
    POST /answer            the oracle's question
    POST /say               writes a line to stdout, and one to stderr
    POST /stat              a process of its own looks at the file that the request names
    POST /eat               it takes memory until it is killed
    POST /end               it ends with status 0

It reads the kernel cache first, if there is one. SIGTERM, SIGINT and SIGHUP end it with status 5.

Behaviours: never-ready, dies=STATUS, dies-on-a-cache, slow-end=SECONDS (once it was asked to end),
drains=SECONDS (then it ends with status 0; with 9, and at once, if it is asked to end a second time), daemon
(leaves a process in a session of its own), orphans (processes that end at once, and are nobody's children),
loud (a megabyte of all bytes, to stdout and stderr in turns), late=SECONDS (it listens only then).
"""

import http.server
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

BEHAVIOURS = dict(word.partition("=")[::2] for word in sys.argv[1:-1])
PORT = int(sys.argv[-1])
CACHE = Path(os.environ.get("TRITON_CACHE_DIR") or "/nowhere")
draining: list[threading.Timer] = []
found = [path for path in CACHE.rglob("*") if path.is_file()]
for path in found:
    path.read_bytes()


def leave(*, lives: bool) -> None:
    """A process in a session of its own, whose parent has ended."""
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0 and lives:
            time.sleep(1000)
        os._exit(0)
    os.wait()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path == "/health":
            self.reply("never" if "never-ready" in BEHAVIOURS else "ready", "never-ready" in BEHAVIOURS)
        else:
            facts = {"environment": dict(os.environ), "directory": os.getcwd(), "pid": os.getpid()}
            self.reply(json.dumps(facts | {"nofile": os.sysconf("SC_OPEN_MAX"), "cache": len(found)}))

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.reply(json.dumps({"answer": 42, "asked": body.decode()}))
        if self.path == "/say":
            os.write(1, b"to stdout\n")
            os.write(2, b"to stderr\n")
        if self.path == "/stat" and os.fork() == 0:
            os.stat(json.loads(body))
            os._exit(0)
        eaten = []
        while self.path == "/eat":
            eaten.append(b"x" * (1 << 20))
        if self.path == "/end":
            os._exit(0)

    def reply(self, text: str, fails: bool = False) -> None:
        self.send_response(503 if fails else 200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())
        self.wfile.flush()

    def log_message(self, *_: object) -> None:
        pass


def end(signum: int, _: object) -> None:
    os.write(2, f"mule: signal {signum}\n".encode())
    if "drains" in BEHAVIOURS:
        if draining:
            os._exit(9)
        draining.append(threading.Timer(float(BEHAVIOURS["drains"]), os._exit, [0]))
        draining[0].start()
        return
    time.sleep(float(BEHAVIOURS.get("slow-end", 0)))
    os._exit(5)


def main() -> None:
    # A signal between the interpreter's last look and a system call would wait for the next one, if it did
    # not also make a descriptor readable.
    wakes, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, end)
    signal.signal(signal.SIGUSR1, lambda *_: os.write(2, b"mule: signal 10\n"))
    os.write(2, f"mule: starts on {len(found)} files\n".encode())
    if "dies-on-a-cache" in BEHAVIOURS and found:
        os._exit(9)
    if "dies" in BEHAVIOURS:
        os._exit(int(BEHAVIOURS["dies"]))
    if "daemon" in BEHAVIOURS:
        leave(lives=True)
    for _ in range(20 if "orphans" in BEHAVIOURS else 0):
        leave(lives=False)
    if "loud" in BEHAVIOURS:
        for number in range(1024):
            os.write(1 + number % 2, bytes(range(256)) * 4)
    time.sleep(float(BEHAVIOURS.get("late", 0)))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", PORT), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    while True:
        os.read(wakes, 1)


if __name__ == "__main__":
    main()
