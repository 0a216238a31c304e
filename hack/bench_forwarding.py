# SPDX-License-Identifier: Apache-2.0
"""Measure what forwarding costs: latency, throughput of streams, memory of idle connections.

A small server runs in a cell. It is asked through a published port of the host, as clients do, and directly,
over connections that begin in the cell's own network. Both are asked in turns, so that they meet the same
load of the machine.
"""

import argparse
import contextlib
import json
import os
import resource
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rekindle.cell import Cell, Command, Network
from rekindle.engine import Endpoint
from restore.client_address import ClientAddress
from restore.serve.address import bind, listen
from restore.serve.foreground import RestoredServer, ServerPids, Serving
from restore.signals import Signals

PORT = 8000
REQUEST = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
WANTED = {"latency_ms": 0.3, "stream": 0.95, "idle_mb": 50.0}

# The answer to "GET /N" are N chunks. Each takes what a token takes an API server at least: a JSON document.
SERVER = """
import asyncio, json, sys
class Server(asyncio.Protocol):
    def connection_made(self, transport):
        self.transport, self.task = transport, None
    def data_received(self, content):
        count = int(content.split(b" ", 2)[1][1:] or b"0")
        if not count:
            self.transport.write(b"HTTP/1.1 200 OK\\r\\nContent-Length: 2\\r\\n\\r\\nok")
        else:
            self.task = asyncio.ensure_future(self.stream(count))
    async def stream(self, count):
        self.transport.write(b"HTTP/1.1 200 OK\\r\\nTransfer-Encoding: chunked\\r\\n\\r\\n")
        for number in range(count):
            choice = {"index": 0, "text": f" {number}", "logprobs": None, "finish_reason": None}
            document = {"id": "cmpl-1", "object": "text_completion", "created": 1, "choices": [choice]}
            data = b"data: " + json.dumps(document).encode() + b"\\n\\n"
            self.transport.write(b"%x\\r\\n%s\\r\\n" % (len(data), data))
            await asyncio.sleep(0)
        self.transport.write(b"0\\r\\n\\r\\n")
async def main():
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Server, "127.0.0.1", int(sys.argv[1]), backlog=4096)
    await server.serve_forever()
asyncio.run(main())
"""


def serve(told: int, kind: str | None) -> None:
    """Serve the server in a cell, as a restore does, and write the published port and the cell's init."""
    with Signals() as signals, Cell() as cell:
        cell.enter(Network.PRIVATE)
        pid = cell.spawn(
            Command(
                [sys.executable, "-c", SERVER, str(PORT)],
                dict(os.environ),
                Path("/"),
                files={2: Path("/dev/null")},
            )
        )
        replica = RestoredServer(cell, ServerPids(root_pid=pid, server_pid=pid))
        target = Endpoint(host="127.0.0.1", port=PORT)
        with contextlib.suppress(OSError), Serving(replica, signals) as serving:
            serving.client_address = ClientAddress(kind) if kind else None
            published = bind(Endpoint(host="127.0.0.1", port=0))
            listen(published, target)
            os.write(told, json.dumps([published.getsockname()[1], cell.init_pid]).encode() + b"\n")
            serving.publish(published, target)
            serving.run()


Connect = Callable[[], socket.socket]


def in_network_of(pid: int) -> Connect:
    """Return a function that connects within the network of a process; only that socket is in it."""

    def connect() -> socket.socket:
        with open("/proc/self/ns/net", "rb") as ours, open(f"/proc/{pid}/ns/net", "rb") as theirs:
            _setns(theirs.fileno())
            try:
                return _connected(PORT)
            finally:
                _setns(ours.fileno())

    return connect


def _setns(fd: int) -> None:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(fd, 0x40000000):
        raise OSError(ctypes.get_errno(), "setns")


def _connected(port: int) -> socket.socket:
    deadline = time.monotonic() + 20
    while True:
        try:
            sock = socket.create_connection(("127.0.0.1", port), timeout=30)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return sock
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def round_trips(sock: socket.socket, count: int) -> list[float]:
    """Return how long each of so many requests over one connection took, in milliseconds."""
    found = []
    for _ in range(count):
        began = time.perf_counter()
        sock.sendall(REQUEST)
        content = b""
        while not content.endswith(b"ok"):
            content += sock.recv(4096)
        found.append((time.perf_counter() - began) * 1000)
    return found


def first_answers(connect: Connect, count: int) -> list[float]:
    """Return how long so many requests took over a new connection each, in milliseconds."""
    found = []
    for _ in range(count):
        began = time.perf_counter()
        with connect() as sock:
            round_trips(sock, 1)
        found.append((time.perf_counter() - began) * 1000)
    return found


def chunks_per_second(socks: list[socket.socket], count: int) -> float:
    """Let the server answer in `count` chunks over each connection at once, and read them all."""
    import selectors

    began = time.perf_counter()
    tails = dict.fromkeys(socks, b"")
    with selectors.DefaultSelector() as selector:
        for sock in socks:
            sock.sendall(b"GET /%d HTTP/1.1\r\nHost: a\r\n\r\n" % count)
            selector.register(sock, selectors.EVENT_READ)
        while selector.get_map():
            for key, _ in selector.select():
                each = key.fileobj
                assert isinstance(each, socket.socket)
                tails[each] = (tails[each] + each.recv(1 << 18))[-7:]
                if tails[each] == b"\r\n0\r\n\r\n":
                    selector.unregister(each)
    return len(socks) * count / (time.perf_counter() - began)


def memory_mb(pid: int) -> float:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    raise ValueError(pid)


@contextlib.contextmanager
def serving(kind: str | None) -> Iterator[tuple[Connect, Connect, int]]:
    """Yield how to connect directly and through the published port, and the PID of the forwarder."""
    told, tell = os.pipe()
    words = ["--serve", str(tell), *(["--client-address", kind] if kind else [])]
    process = subprocess.Popen([sys.executable, "-m", "hack.bench_forwarding", *words], pass_fds=[tell])
    os.close(tell)
    try:
        port, init = json.loads(os.read(told, 100))
        direct = in_network_of(init)
        direct().close()
        yield direct, lambda: _connected(port), process.pid
    finally:
        process.terminate()
        process.wait(20)


def measure(rounds: int, kind: str | None) -> dict[str, Any]:
    with serving(kind) as (direct, forwarded, pid), contextlib.ExitStack() as stack:
        ways = {"direct": direct, "forwarded": forwarded}
        kept = {name: stack.enter_context(connect()) for name, connect in ways.items()}
        trips: dict[str, list[float]] = {name: [] for name in ways}
        firsts: dict[str, list[float]] = {name: [] for name in ways}
        one: dict[str, list[float]] = {name: [] for name in ways}
        many: dict[str, list[float]] = {name: [] for name in ways}
        crowds = {name: [stack.enter_context(connect()) for _ in range(16)] for name, connect in ways.items()}
        for number in range(rounds):
            for name in sorted(ways, reverse=number % 2 == 1):
                trips[name] += round_trips(kept[name], 200)
                firsts[name] += first_answers(ways[name], 20)
                one[name].append(chunks_per_second([kept[name]], 5000))
                many[name].append(chunks_per_second(crowds[name], 500))
        idle = 2000
        before = memory_mb(pid)
        for _ in range(idle):
            stack.enter_context(forwarded())
        round_trips(kept["forwarded"], 10)
        middle = {
            name: {way: statistics.median(values) for way, values in found.items()}
            for name, found in (("trips", trips), ("firsts", firsts), ("one", one), ("many", many))
        }
        return {
            "rounds": rounds,
            "load": os.getloadavg()[0],
            "client_address": kind,
            "latency_ms": middle["trips"],
            "added_latency_ms": middle["trips"]["forwarded"] - middle["trips"]["direct"],
            "added_first_ms": middle["firsts"]["forwarded"] - middle["firsts"]["direct"],
            "stream": middle["one"]["forwarded"] / middle["one"]["direct"],
            "streams_16": middle["many"]["forwarded"] / middle["many"]["direct"],
            "chunks_per_second": {"one": middle["one"], "sixteen": middle["many"]},
            "idle_2000_mb": memory_mb(pid) - before,
            "forwarder_mb": memory_mb(pid),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10, help="turns of both ways (default: 10)")
    parser.add_argument("--client-address", help="as that of `rekindle restore`")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve is not None:
        serve(args.serve, args.client_address)
        return
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    found = measure(args.rounds, args.client_address)
    if args.json:
        print(json.dumps(found, indent=2))
        return
    rows = [
        (
            "added latency, kept connection, median (ms)",
            found["added_latency_ms"],
            f"<= {WANTED['latency_ms']}",
        ),
        ("added latency, new connection, median (ms)", found["added_first_ms"], ""),
        ("throughput of one stream, of direct", found["stream"], f">= {WANTED['stream']}"),
        ("throughput of 16 streams, of direct", found["streams_16"], f">= {WANTED['stream']}"),
        ("memory of 2,000 idle connections (MB)", found["idle_2000_mb"], f"<= {WANTED['idle_mb']:.0f}"),
    ]
    for text, value, wanted in rows:
        print(f"{text:<46}{value:8.3f}  {wanted}")
    print(f"{args.rounds} rounds, load {found['load']:.1f}")


if __name__ == "__main__":
    main()
