# SPDX-License-Identifier: Apache-2.0
"""A server that draws random numbers in several processes: `dice.py PORT [BEHAVIOUR…]`.

    GET  /draw     one of each kind of random number, by process, as JSON
    GET  /facts    what it sees of the hook and its callbacks, as JSON
    POST /fork     forks one more process that draws
    POST /answer   the oracle's question

It draws once from each kind before it serves, so that every generator has a state. Its processes are itself,
a child that is spawned, and one that is forked.

Behaviours: seeded (with 7, as a program that wants the same numbers at each start), busy (a child holds the
GIL in C half a second at a time), callbacks, callbacks-of-package (by snapshot_restore_py), fails=PHASE (a
callback raises), stuck (a callback after the restore holds the GIL for a minute), isolated (a child runs
under `python -I`), with=NAME,… (imports numpy or cryptography, and draws from them).
"""

import ctypes
import http.server
import json
import multiprocessing
import random
import ssl
import subprocess
import sys
import tempfile
import threading
import uuid
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

BEHAVIOURS = dict(word.partition("=")[::2] for word in sys.argv[2:])
called: list[str] = []


def draw() -> dict[str, Any]:
    made = {
        "random": random.random(),
        "openssl": ssl.RAND_bytes(8).hex(),
        "uuid1": uuid.uuid1().clock_seq,
        "tempfile": next(tempfile._get_candidate_names()),  # type: ignore[attr-defined]
    }
    if "numpy" in sys.modules:
        made["numpy"] = sys.modules["numpy"].random.rand()
    if (compiled := sys.modules.get("cryptography.hazmat.primitives.asymmetric.ec")) is not None:
        key = compiled.generate_private_key(compiled.SECP256R1())
        made["cryptography"] = hex(key.private_numbers().private_value)
    return made


def serve_draws(pipe: Connection) -> None:
    draw()
    while pipe.recv():
        pipe.send(draw())


def start(method: str) -> None:
    ours, theirs = multiprocessing.Pipe()
    context: Any = multiprocessing.get_context(method)
    context.Process(target=serve_draws, args=[theirs], daemon=True).start()
    children[f"{method} {len(children)}"] = ours


def hold_gil(seconds: float) -> None:
    ctypes.PyDLL(None).usleep(int(seconds * 1e6))


def hold_gil_again_and_again() -> None:
    while True:
        hold_gil(0.5)


children: dict[str, Connection] = {}


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/draw":
            drawn = {"itself": draw()}
            for name, pipe in children.items():
                pipe.send(True)
                drawn[name] = pipe.recv()
            self.reply(drawn)
        elif self.path == "/facts":
            generation = Path("/dev/shm/rekindle/generation")
            threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
            self.reply(
                {
                    "called": called,
                    "generation": generation.read_text().strip() if generation.exists() else None,
                    "threads": threads,
                    "own_site": getattr(sys, "own_site", None),
                    "site_file": getattr(sys.modules.get("sitecustomize"), "__file__", None),
                }
            )
        else:
            self.reply("ready")

    def do_POST(self) -> None:
        asked = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        if self.path == "/fork":
            start("fork")
        self.reply({"answer": 42, "asked": asked})

    def reply(self, content: object) -> None:
        text = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        pass


def register() -> None:
    def call(name: str) -> None:
        called.append(name)
        if BEHAVIOURS.get("fails") == name.split()[0]:
            raise ValueError(f"{name} of the test")
        if "stuck" in BEHAVIOURS and name.startswith("after"):
            hold_gil(60)

    if "callbacks-of-package" in BEHAVIOURS:
        import snapshot_restore_py as hooks  # type: ignore[import-not-found]
    else:
        import rekindle_hook as hooks  # type: ignore[import-not-found]
    for number in (1, 2):
        hooks.register_before_snapshot(call, f"before {number}")
        hooks.register_after_restore(call, name=f"after {number}")


def main() -> None:
    for name in ("numpy", "cryptography.hazmat.primitives.asymmetric.ec"):
        if name.partition(".")[0] in BEHAVIOURS.get("with", "").split(","):
            __import__(name)
    if "seeded" in BEHAVIOURS:
        random.seed(7)
    draw()
    for method in ("spawn", "fork"):
        start(method)
    if "busy" in BEHAVIOURS:
        multiprocessing.Process(target=hold_gil_again_and_again, daemon=True).start()
    if "isolated" in BEHAVIOURS:
        subprocess.Popen([sys.executable, "-I", "-c", "import time; time.sleep(1000)"])
    if {"callbacks", "callbacks-of-package", "fails", "stuck"} & BEHAVIOURS.keys():
        register()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever).start()


if __name__ == "__main__":
    main()
