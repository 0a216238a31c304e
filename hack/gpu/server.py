# SPDX-License-Identifier: Apache-2.0
"""The server of the acceptance test. It needs the standard library, torch and Triton.

    server.py serve PORT [--gib N] [--quick]    serve a small decoder on the GPU
    server.py load STARTED UNTIL                keep GPU and processors busy until the file UNTIL exists
    server.py rates                             print copy rates in bytes per second as JSON

    GET  /health            200 once the server is ready
    GET  /facts             what the server holds, its versions, and the phases of its start
    POST /answer            {"prompt", "count"}: tokens, and a checksum of the weights
    POST /count             add one to a counter in device memory; the count
    POST /busy              {"seconds"}: keep the GPU busy for so long; answered at once

With --stand-in, the model is a process that holds CUDA state only according to the tests' fake driver.
"""

import argparse
import http.server
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

BEGAN = time.monotonic()

# Python has put this file's directory on the path. Replace it by the root of the checkout: modules then have
# the same names as everywhere, and hide none of torch's environment.
sys.path[0] = str(Path(__file__).resolve().parents[2])


class Model(Protocol):
    """A model, real or a stand-in."""

    def answer(self, prompt: list[int], count: int) -> dict[str, Any]: ...

    def count(self) -> int: ...

    def be_busy(self, seconds: float) -> None: ...

    def facts(self) -> dict[str, Any]: ...


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    model: Model
    extra: Callable[[], int] | None = None

    def do_GET(self) -> None:
        if self.path == "/health":
            self._reply("ready")
        elif self.path == "/facts":
            self._reply({"pid": os.getpid(), **self.model.facts()})
        else:
            self._reply("not found", 404)

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
        if self.path == "/answer":
            answer = self.model.answer(asked["prompt"], asked["count"])
            if self.extra is not None:
                answer["checksum"] = [answer["checksum"], self.extra()]
            self._reply(answer)
        elif self.path == "/count":
            self._reply(self.model.count())
        elif self.path == "/busy":
            self.model.be_busy(asked["seconds"])
            self._reply("busy")
        else:
            self._reply("not found", 404)

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
    serving.add_argument("--with", dest="feature", default="", help="hold one of hack/gpu/features.py, too")
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
    from hack.gpu import features

    features.before_torch(args.feature)
    if args.stand_in:
        from hack.gpu import stand_in

        Handler.model = stand_in.StandIn(args.gib, BEGAN, quick=args.quick)
    else:
        from hack.gpu import decoder

        Handler.model = decoder.Decoder(args.gib, BEGAN, quick=args.quick)
        if args.feature:
            held = features.held(args.feature)
            Handler.extra = staticmethod(held)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", args.port), Handler)
    server.daemon_threads = True
    print(json.dumps({"ready": True, **Handler.model.facts()}), flush=True)
    server.serve_forever()


def load(args: argparse.Namespace) -> None:
    """Load the machine as another tenant would: the GPU, and half of the processors."""
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
    """Use memory and processor until the file exists or the parent is gone."""
    parent, memory = os.getppid(), bytearray(64 << 20)
    while not until.exists() and os.getppid() == parent:
        for _ in range(20):
            memory[:] = bytes(len(memory))
            sum(range(100_000))


if __name__ == "__main__":
    main()
