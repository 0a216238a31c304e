# SPDX-License-Identifier: Apache-2.0
"""The server of hack/gpu-acceptance, on the standard library, torch and Triton.

    server.py serve PORT [--gib N] [--quick]     a small decoder on the GPU
    server.py load STARTED UNTIL                 keeps GPU and processor busy until a file is there
    server.py rates                              what can be copied a second, as JSON

    GET  /health            200 once it is ready
    GET  /facts             what it holds, of what versions, and how long it took to start
    POST /answer            {"prompt", "count"}: tokens, and a checksum of all that is on the device
    POST /count             adds one in device memory, and answers with the count
    POST /busy              {"seconds"}: the GPU has something to do for as long; answers at once

With --stand-in, what computes is a process that holds CUDA only in the eyes of the tests' fake driver.
"""

import argparse
import http.server
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, Protocol

BEGAN = time.monotonic()

# This file is run by its path, in a Python that knows nothing of this checkout. Its modules are found from
# the root, as everywhere, and not beside this file, where their names would hide others.
sys.path[0] = str(Path(__file__).resolve().parents[2])


class Model(Protocol):
    """What is asked of a model, real or stood in for."""

    def answer(self, prompt: list[int], count: int) -> dict[str, Any]: ...

    def count(self) -> int: ...

    def be_busy(self, seconds: float) -> None: ...

    def facts(self) -> dict[str, Any]: ...


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    model: Model

    def do_GET(self) -> None:
        if self.path == "/health":
            self._reply("ready")
        elif self.path == "/facts":
            self._reply({"pid": os.getpid(), **self.model.facts()})
        else:
            self._reply("no such page", 404)

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
        if self.path == "/answer":
            self._reply(self.model.answer(asked["prompt"], asked["count"]))
        elif self.path == "/count":
            self._reply(self.model.count())
        elif self.path == "/busy":
            self.model.be_busy(asked["seconds"])
            self._reply("busy")
        else:
            self._reply("no such page", 404)

    def _reply(self, value: object, status: int = 200) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--stand-in", action="store_true")
    verbs = parser.add_subparsers(dest="verb", required=True)
    serving = verbs.add_parser("serve")
    serving.add_argument("port", type=int)
    serving.add_argument("--gib", type=float, default=4.0)
    serving.add_argument("--quick", action="store_true")
    loading = verbs.add_parser("load")
    loading.add_argument("started", type=Path)
    loading.add_argument("until", type=Path)
    verbs.add_parser("rates")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    if args.verb == "serve":
        serve(args)
    elif args.verb == "load":
        load(args)
    elif args.stand_in:
        print(json.dumps({}))
    else:
        from hack.gpu import decoder

        print(json.dumps({**decoder.device_facts(), "rates": decoder.copy_rates()}))


def serve(args: argparse.Namespace) -> None:
    if args.stand_in:
        from hack.gpu import stand_in

        Handler.model = stand_in.StandIn(args.gib, BEGAN, quick=args.quick)
    else:
        from hack.gpu import decoder

        Handler.model = decoder.Decoder(args.gib, BEGAN, quick=args.quick)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", args.port), Handler)
    server.daemon_threads = True
    print(json.dumps({"ready": True, **Handler.model.facts()}), flush=True)
    server.serve_forever()


def load(args: argparse.Namespace) -> None:
    """As another tenant of the machine would be: half of the processors, and the GPU."""
    for _ in range(max(1, (os.cpu_count() or 1) // 2) if not args.stand_in else 1):
        if os.fork() == 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            burn(args.until)
            os._exit(0)
    if args.stand_in:
        args.started.touch()
        while not args.until.exists():
            time.sleep(0.05)
    else:
        from hack.gpu import decoder

        decoder.load(args.started, args.until)


def burn(until: Path) -> None:
    """Touches memory, and computes; ends with its parent, too."""
    parent, memory = os.getppid(), bytearray(64 << 20)
    while not until.exists() and os.getppid() == parent:
        for _ in range(20):
            memory[:] = bytes(len(memory))
            sum(range(100_000))


if __name__ == "__main__":
    main()
