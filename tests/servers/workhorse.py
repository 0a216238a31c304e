# SPDX-License-Identifier: Apache-2.0
"""A server that holds all that a checkpoint must keep: `workhorse.py PORT [BEHAVIOUR…]`.

    GET  /health            200 once it is ready
    POST /count             adds one; answers with the count, which lives in memory only
    GET  /facts             what it sees of its surroundings, as JSON
    GET  /stream?n=N        N chunks, 50 ms apart
    POST /answer            the oracle's question
    POST /fork              forks a process, which changes some of the memory that it shares
    GET  /herd              what these processes and the server itself have in memory, as digests
    POST /keep              keeps the body in memory
    POST /grow?mib=N        writes N MiB of new memory, in place of what an earlier call wrote

Behaviours: never-ready, dies-warming, moody (another answer every time), file=PATH (answers with the
file's content), hold=WHAT,… (what holds.py says, at path=PATH), slow-exit, cuda=MIB (holds CUDA, as far
as tests/fakes/cuda.py goes, and the oracle waits until that is running), cuda-uuids=UUID,… (on these GPUs),
uid=N (runs as that user), cuda-child (so does its child), cuda-others=N (so do so many more), cuda-idle (a
process that has called cuInit, and no more), also=[HOST]:PORT,… (listens there, too; IPv6 alone at an IPv6
address), nvml=N (calls nvmlInit so many times, and never nvmlShutdown),
libcuda (calls cuInit of the libcuda that there is, whatever comes of it).
"""

import contextlib
import ctypes
import hashlib
import http.server
import json
import multiprocessing.shared_memory
import os
import pathlib
import platform
import select
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from urllib.parse import parse_qs, urlsplit

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
from tests.servers.holds import fork, hold_all

PORT = int(sys.argv[1])
BEHAVIOURS = dict(word.partition("=")[::2] for word in sys.argv[2:])
libc = ctypes.CDLL(None, use_errno=True)

state = {"count": 0}
memory = multiprocessing.shared_memory.SharedMemory(create=True, size=1 << 20)
assert memory.buf is not None
shared = memory.buf
shared[:5] = b"hello"
lock = multiprocessing.get_context("spawn").Lock()  # a POSIX semaphore, unlinked while in use
pair = socket.socketpair()
zeros = bytearray(8 << 20)  # pages that are written and zero
random = bytearray(os.urandom(1 << 20) * 4)
timer = libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK)  # which nobody reads until it is asked for
libc.timerfd_settime(timer, 0, struct.pack("qqqq", 0, 50_000_000, 0, 1_000_000), None)
deleted = open(f"{os.environ['TMPDIR']}/deleted", "w+b")
deleted.write(b"ghost")
deleted.flush()
os.unlink(deleted.name)


def begin_restore_thread() -> object:
    """Start what libcuda starts in cuInit; return anything."""
    sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
    from tests.fakes.cuda_engine import begin_restore_thread

    return begin_restore_thread()


def child(reader: int) -> None:
    """A process of its own, which shares pages with its parent and has cleared some of them."""
    if "cuda-child" in BEHAVIOURS:
        begin_restore_thread()
    zeros[:] = bytes(len(zeros))
    random[: 1 << 20] = bytes(1 << 20)
    while os.read(reader, 1):
        pair[1].sendall(b"pong" if not any(random[: 1 << 20]) and any(random[1 << 20 :]) else b"torn")


requests, to_child = os.pipe()
zeros[:] = b"\1" * len(zeros)
child_pid = os.fork()
if child_pid == 0:
    os.close(to_child)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    child(requests)
    os._exit(0)
zeros[:] = bytes(len(zeros))


def timer_runs() -> bool:
    """Whether the timer expires again after its expiries so far were read."""
    if select.select([timer], [], [], 1)[0]:
        os.read(timer, 8)
    return bool(select.select([timer], [], [], 1)[0])


def io_uring_errno() -> int:
    libc.syscall(425, 1, ctypes.create_string_buffer(120))
    return ctypes.get_errno()


def xcomp_permission() -> int:
    """Which extended states this process may use: bit 18 is AMX's tile data (x86-64 only)."""
    mask = ctypes.c_ulong()
    libc.syscall(158, 0x1022, ctypes.byref(mask))
    return mask.value


if platform.machine() == "x86_64":
    libc.syscall(158, 0x1023, 18)  # asks for AMX, as a library that uses it does


cuda_states: list[pathlib.Path] = []
herd: list[socket.socket] = []
grown = b""
kept: list[bytes] = []


def in_memory() -> list[object]:
    digests = [hashlib.sha256(each).hexdigest()[:16] for each in (random, zeros, grown)]
    return [os.getpid(), state["count"], *digests]


def foal() -> None:
    """A process that has the memory of its parent, some of which it changes."""
    ours, theirs = socket.socketpair()
    herd.append(ours)
    if os.fork():
        theirs.close()
        return
    ours.close()
    random[: 1 << 16] = str(os.getpid()).encode().ljust(1 << 16)
    while theirs.recv(1):
        theirs.sendall(json.dumps(in_memory()).encode())
    os._exit(0)


def claim_cuda() -> None:
    sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
    from tests.fakes.cuda import UUID, claim

    uuids = BEHAVIOURS.get("cuda-uuids", UUID).split(",")
    others = [fork(begin_restore_thread) for _ in range(int(BEHAVIOURS.get("cuda-others", 0)))]
    for pid in [*[0, child_pid][: 1 + ("cuda-child" in BEHAVIOURS)], *others]:
        cuda_states.append(claim(int(BEHAVIOURS["cuda"] or 0), uuids=uuids, pid=pid))


def wait_for_cuda() -> None:
    while cuda_states and json.loads(cuda_states[0].read_bytes())["state"] != "running":
        time.sleep(0.01)


def opened_now() -> Iterator[tuple[str, str]]:
    for path in pathlib.Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            yield path.name, os.readlink(path)


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        if url.path == "/health":
            self.reply("ready", 503 if "never-ready" in BEHAVIOURS else 200)
        elif url.path == "/facts":
            os.write(to_child, b"?")
            deleted.seek(0)
            own = pathlib.Path("/proc/self")
            with lock:
                facts = {
                    "pid": os.getpid(),
                    "child": pair[0].recv(4).decode(),
                    "monotonic": time.monotonic(),
                    "boottime": time.clock_gettime(time.CLOCK_BOOTTIME),
                    "io_uring_errno": io_uring_errno(),
                    "xcomp_permission": xcomp_permission() if platform.machine() == "x86_64" else 0,
                    "shared": bytes(shared[:5]).decode(),
                    "zeros": not any(zeros),
                    "timer": timer_runs(),
                    "deleted": deleted.read().decode(),
                    "hash_seed": os.environ.get("PYTHONHASHSEED"),
                    "odd": os.environ.get("odd.name"),  # noqa: SIM112
                    "large": len(os.environ.get("LARGE", "")),
                    "threads": [path.read_text().strip() for path in own.glob("task/*/comm")],
                    "descriptors": dict(opened_now()),
                    "cuda": [json.loads(path.read_bytes()) for path in cuda_states],
                }
            self.reply(json.dumps(facts))
        elif url.path == "/herd":
            found = [in_memory()]
            for each in herd:
                each.sendall(b"?")
                found.append(json.loads(each.recv(4096)))
            self.reply(json.dumps(found))
        elif url.path == "/stream":
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for number in range(int(parse_qs(url.query)["n"][0])):
                text = f"data: {number}\n\n".encode()
                self.wfile.write(b"%x\r\n%s\r\n" % (len(text), text))
                self.wfile.flush()
                time.sleep(0.05)
            self.wfile.write(b"0\r\n\r\n")
        else:
            self.reply("no such page", 404)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if "dies-warming" in BEHAVIOURS:
            print("workhorse: out of oats", file=sys.stderr, flush=True)
            os._exit(3)
        if self.path == "/count":
            state["count"] += 1
            print(f"count {state['count']}", flush=True)
            self.reply(str(state["count"]))
        elif self.path == "/fork":
            foal()
            self.reply(str(len(herd)))
        elif self.path == "/keep":
            kept.append(body)
            self.reply(str(len(kept)))
        elif self.path.startswith("/grow"):
            global grown
            grown = os.urandom(int(parse_qs(urlsplit(self.path).query)["mib"][0]) << 20)
            self.reply(str(len(grown)))
        elif self.path == "/answer":
            wait_for_cuda()
            answer: object = 42
            if "moody" in BEHAVIOURS:
                answer = time.time_ns()
            elif "file" in BEHAVIOURS:
                with open(BEHAVIOURS["file"]) as file:
                    answer = file.read()
            self.reply(json.dumps({"answer": answer, "when": time.time(), "asked": body.decode()}))
        else:
            self.reply(str(len(body)))

    def reply(self, text: str, status: int = 200) -> None:
        content = text.encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


class AlsoServer(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        super().server_bind()


def listen_also(address: str) -> None:
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    AlsoServer.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
    threading.Thread(target=AlsoServer((host, int(port)), Handler).serve_forever, daemon=True).start()


def main() -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", PORT), Handler)
    server.daemon_threads = True

    def stop(signum: int, _: object) -> None:
        print(f"workhorse: signal {signum}", file=sys.stderr, flush=True)
        for path in cuda_states:
            path.unlink(missing_ok=True)
        os._exit(7)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    for _ in range(4):
        threading.Thread(target=threading.Event().wait, daemon=True).start()
    for address in filter(None, BEHAVIOURS.get("also", "").split(",")):
        listen_also(address)
    held = hold_all(BEHAVIOURS.get("hold", ""), BEHAVIOURS.get("path", ""))
    if "cuda" in BEHAVIOURS:
        claim_cuda()
    for _ in range(int(BEHAVIOURS.get("nvml", 0))):
        assert ctypes.CDLL("libnvidia-ml.so.1").nvmlInit_v2() == 0
    if "libcuda" in BEHAVIOURS:
        ctypes.CDLL("libcuda.so.1").cuInit(0)
    if "cuda-idle" in BEHAVIOURS:
        fork(begin_restore_thread)
    if "uid" in BEHAVIOURS:
        os.setresuid(*[int(BEHAVIOURS["uid"])] * 3)
    print("workhorse: serving", flush=True)
    server.serve_forever()
    del held


if __name__ == "__main__":
    main()
