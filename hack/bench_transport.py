# SPDX-License-Identifier: Apache-2.0
"""Compare the transports of two checkouts over a registry in memory; see hack/bench-transport.

The registry is a process of its own and does next to nothing, so that the client is what is timed. The
checkouts take turns, each in a fresh process; a run has its first bytes before the clock starts.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import re
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rekindle.run import run

BLOB_BYTES = 512 << 20
_FIRST_BYTES = 8 << 20
_ASK_BYTES = 1 << 19  # for each, there is one small request
_RANGE = re.compile(rb"bytes=(\d+)-(\d+)")
_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
CASES = ("GET, 1 connection", "GET, 8 connections", "PUT", "small requests")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("other", type=Path)
    parser.add_argument("runs", type=int, nargs="?", default=9)
    args = parser.parse_args()
    trees = {"other": args.other.resolve(), "this": Path(__file__).parent.parent}
    seconds: dict[tuple[str, str], list[float]] = {}
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        pid = os.fork()
        if pid == 0:
            serve(server)
        try:
            for number in range(args.runs):
                for name in list(trees)[:: 1 if number % 2 else -1]:
                    for case, took in timed(trees[name], server.getsockname()[1]).items():
                        seconds.setdefault((case, name), []).append(took)
        finally:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
    print(f"medians, n = {args.runs}; the ratio is this to other, less is faster")
    for case in CASES:
        other, this = seconds[case, "other"], seconds[case, "this"]
        ratio = statistics.median(this) / statistics.median(other)
        print(
            f"{case:<20} other {statistics.median(other):.3f} s ({min(other):.3f}-{max(other):.3f})"
            f"  this {statistics.median(this):.3f} s ({min(this):.3f}-{max(this):.3f})  ratio {ratio:.3f}"
        )


def timed(tree: Path, port: int) -> dict[str, float]:
    """Run `measure` with the code of a checkout."""
    with tempfile.NamedTemporaryFile("r", suffix=".json") as result:
        code = f"import runpy; runpy.run_path({__file__!r})['measure']({port}, {result.name!r})"
        argv = [sys.executable, "-c", code]
        done = run(
            argv, timeout=300, env={**os.environ, "PYTHONPATH": str(tree)}, cwd=Path(tempfile.gettempdir())
        )
        assert done.status == 0, done.output
        out: dict[str, float] = json.load(result)
    return out


def serve(server: socket.socket) -> None:
    """Serve zeros to every GET, and take every upload without a look at it."""
    blob = memoryview(bytes(BLOB_BYTES))
    while True:
        connection, _ = server.accept()
        threading.Thread(target=_serve_one, args=(connection, blob), daemon=True).start()


def _serve_one(connection: socket.socket, blob: memoryview) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    buffer = bytearray(1 << 20)
    data = b""
    with connection, contextlib.suppress(OSError):
        while True:
            while b"\r\n\r\n" not in data:
                piece = connection.recv(1 << 16)
                if not piece:
                    return
                data += piece
            head, _, data = data.partition(b"\r\n\r\n")
            length = _LENGTH.search(head)
            left = int(length[1]) - len(data) if length else 0
            while left > 0:
                left -= connection.recv_into(buffer, min(left, len(buffer)))
            data = b"" if length else data
            connection.sendall(_head_of_answer(head))
            if head.startswith(b"GET"):
                connection.sendall(blob[slice(*_asked(head))])


def _asked(head: bytes) -> tuple[int, int]:
    found = _RANGE.search(head)
    return (int(found[1]), int(found[2]) + 1) if found else (0, 1)


def _head_of_answer(head: bytes) -> bytes:
    begin, end = _asked(head)
    match head.partition(b" ")[0]:
        case b"GET":
            where = b"Content-Range: bytes %d-%d/*\r\n" % (begin, end - 1)
            return b"HTTP/1.1 206 Part\r\n%sContent-Length: %d\r\n\r\n" % (where, end - begin)
        case b"HEAD":
            return b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n"
        case b"POST":
            return b"HTTP/1.1 202 Accepted\r\nLocation: /upload\r\nContent-Length: 0\r\n\r\n"
    return b"HTTP/1.1 201 Created\r\nContent-Length: 0\r\n\r\n"


# In the process that is timed.


def measure(port: int, result: str) -> None:
    """Write the seconds of each case to a file."""
    out = {}
    for case in CASES:
        with _repository(port, jobs=8 if "8" in case else 1) as repository:
            _prepared(case, repository, _FIRST_BYTES)()
            action = _prepared(case, repository, BLOB_BYTES)
            began = time.perf_counter()
            action()
            out[case] = time.perf_counter() - began
    Path(result).write_text(json.dumps(out))


def _repository(port: int, jobs: int) -> Any:
    from oci.progress import Limiter, Tally
    from oci.reference import parse
    from oci.registry import repository as module
    from rekindle.config import Config

    config = Config.parse(b"[transfer]\njobs = %d\n" % jobs)
    access = vars(module)["Access"](config=config, tally=Tally(), limiter=Limiter(None))
    return vars(module)["Repository"](parse(f"127.0.0.1:{port}/a/b:1"), access)


def _prepared(case: str, repository: Any, size: int) -> Callable[[], None]:
    """Return what is to be timed."""
    from oci.descriptor import Descriptor
    from rekindle.digest import Digest

    content = bytes(size) if case == "PUT" else b""
    blob = Descriptor(media_type="application/octet-stream", digest=Digest.of_bytes(content), size=size)

    def get() -> None:
        buffer = memoryview(bytearray(1 << 20))
        hasher = hashlib.sha256()
        with repository.open_blob(blob) as stream:
            while count := stream.readinto(buffer):
                hasher.update(buffer[:count])

    def put() -> None:
        repository.upload(blob, SimpleNamespace(open_blob=lambda _: io.BytesIO(content)))

    def ask() -> None:
        for _ in range(size // _ASK_BYTES):
            repository.has(blob)

    return {"PUT": put, "small requests": ask}.get(case, get)


if __name__ == "__main__":
    main()
