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
file's content), hold=WHAT (holds something that CRIU cannot dump), slow-exit, cuda=MIB (holds CUDA, as far as
tests/fakes/cuda.py goes, and the oracle waits until that is running), cuda-uuids=UUID,… (on these GPUs),
uid=N (runs as that user), cuda-child (so does its child), cuda-others=N (so do so many more), cuda-idle (a
process that has called cuInit, and no more), also=[HOST]:PORT,… (listens there, too; IPv6 alone at an IPv6
address), nvml=N (calls nvmlInit so many times, and never nvmlShutdown),
libcuda (calls cuInit of the libcuda that there is, whatever comes of it).
"""

import contextlib
import ctypes
import fcntl
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
import sqlite3
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from urllib.parse import parse_qs, urlsplit

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


def hold(what: str) -> object:
    """Something that CRIU cannot dump."""
    if what == "vsock":
        return socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    if what == "idle-sockets":  # which CRIU can dump
        kinds = [(socket.AF_INET, socket.SOCK_STREAM), (socket.AF_INET6, socket.SOCK_DGRAM)]
        return [socket.socket(*kind) for kind in kinds]
    if what == "mptcp":
        server = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_MPTCP)
        server.bind(("127.0.0.1", 0))
        server.listen()
        return server
    if what == "agent":
        agent = socket.socket(socket.AF_UNIX)
        agent.connect(BEHAVIOURS["path"])
        return agent
    if what in ("watch", "watch-elsewhere"):
        watch = libc.inotify_init()
        place = BEHAVIOURS["path"] if what == "watch" else os.environ["TMPDIR"]
        if libc.inotify_add_watch(watch, place.encode(), 0x100) < 0:
            raise OSError(place)
        return watch
    if what in ("epoll", "epoll-emptied"):
        ours, theirs = socket.socketpair()
        poll = select.epoll()
        poll.register(ours, select.EPOLLIN)
        keeper = fork(lambda: theirs)
        if what == "epoll-emptied":
            poll.unregister(ours)
        ours.close()
        return poll, keeper
    if what.startswith("namespace-"):
        return fork(lambda: libc.unshare(int(what.removeprefix("namespace-"), 16)))
    if what == "queue":
        return libc.mq_open(f"/{os.getpid()}".encode(), os.O_CREAT | os.O_RDONLY, 0o600, None)
    if what == "netlink":
        link = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        link.send(struct.pack("=IHHIIBxxx", 20, 18, 0x301, 1, 0, 0))  # list the interfaces
        return link
    if what == "unread":
        listener = socket.create_server(("127.0.0.1", 0))
        client = socket.create_connection(listener.getsockname())
        peer, _ = listener.accept()
        client.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                client.send(bytes(1 << 16))
        return listener, client, peer
    if what == "not-accepted":  # which CRIU can dump
        listener = socket.create_server(("127.0.0.1", 0))
        return listener, socket.create_connection(listener.getsockname())
    if what == "headless":
        if os.fork() == 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            threading.Thread(target=time.sleep, args=(1000,)).start()
            libc.syscall(60, 0)  # ends this thread alone
        time.sleep(0.2)
        return None
    if what == "log":
        file = open(BEHAVIOURS["path"], "w")
        file.write("began\n")
        file.flush()
        return file
    if what == "files":
        return hold("log"), hold_files(BEHAVIOURS["path"])
    if what == "sysv":
        return libc.semget(0, 1, 0o600)
    if what == "unix":
        server = socket.socket(socket.AF_UNIX)
        server.bind(BEHAVIOURS["path"])
        return server
    if what == "link":
        file = open(BEHAVIOURS["path"], "w")
        os.link(BEHAVIOURS["path"], BEHAVIOURS["path"] + "2")
        os.unlink(BEHAVIOURS["path"])
        return file
    if what == "loop":
        return open("/dev/loop-control", "rb")
    if what == "perf":
        attributes = ctypes.create_string_buffer(b"\1\0\0\0\x80\0\0\0", 128)  # software, cpu-clock
        return libc.syscall(298, attributes, 0, -1, -1, 0)
    if what == "device":
        return open(BEHAVIOURS["path"], "rb")
    if what == "device-of-another":
        return fork(lambda: open(BEHAVIOURS["path"], "rb"))
    if what == "dmabuf":  # by the name that the kernel gives it
        device = open("/dmabuf:", "wb")
        os.unlink("/dmabuf:")
        return device
    if what == "child-of-a-thread":  # which CRIU can dump, as it can these two
        threading.Thread(target=subprocess.run, args=(["sleep", "1000"],), daemon=True).start()
        time.sleep(0.2)
        return None
    if what.startswith("multicast"):
        family = socket.AF_INET6 if what.endswith("6") else socket.AF_INET
        member = socket.socket(family, socket.SOCK_DGRAM)
        if family == socket.AF_INET:
            group = socket.inet_aton("239.1.2.3") + socket.inet_aton("127.0.0.1")
            member.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, group)
        else:
            group = socket.inet_pton(family, "ff15::123") + struct.pack("I", 1)
            member.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, group)
        return socket.socket(family, socket.SOCK_DGRAM), member
    if what == "terminal":
        return os.openpty()
    if what == "shell-in-a-terminal":
        shell, terminal = os.forkpty()
        if shell == 0:
            kept = os.open("/dev/tty", os.O_RDWR)
            os.write(kept, b"!")
            os.set_inheritable(kept, True)
            os.execvp("sleep", ["sleep", "1000"])
        os.read(terminal, 1)
        return terminal
    if what == "fork-storm":
        for _ in range(3):
            threading.Thread(target=storm, daemon=True).start()
        return None
    if what == "sparse-deleted":
        deleted = os.open(BEHAVIOURS["path"], os.O_RDWR | os.O_CREAT)
        os.unlink(BEHAVIOURS["path"])
        os.truncate(deleted, 4 << 30)
        os.write(deleted, b"kept")
        return deleted
    if what == "daemon":
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                time.sleep(1000)
            os._exit(0)
        os.wait()
        return None
    raise ValueError(what)


def hold_files(path: str) -> list[object]:
    """Files of every kind that replicas would share."""
    large = open(f"{path}-large", "w")
    os.posix_fallocate(large.fileno(), 0, 65 << 20)
    databases = [sqlite3.connect(place) for place in (f"{path}-database", f"{os.environ['TMPDIR']}/database")]
    for each in databases:
        each.execute("CREATE TABLE kept (number)")
    locked = [os.open(place, os.O_RDONLY) for place in (f"{path}-locked", pathlib.Path(path).parent)]
    for fd in locked:
        fcntl.flock(fd, fcntl.LOCK_EX)
    direct = os.open(f"{path}-direct", os.O_RDWR | os.O_CREAT | os.O_DIRECT)
    return [large, databases, locked, direct, os.open(f"{path}-pipe", os.O_RDWR)]


def storm() -> None:
    """Start short-lived processes all the time."""
    while True:
        subprocess.run(["true"], check=True)
        time.sleep(0.002)


def fork(keep: Callable[[], object]) -> int:
    """A process that keeps something, and does nothing."""
    ready, to_us = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        kept = keep()
        os.write(to_us, b"!")
        while kept is not to_us:
            signal.pause()
    os.read(ready, 1)
    return pid


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
    held = hold(BEHAVIOURS["hold"]) if "hold" in BEHAVIOURS else None
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
