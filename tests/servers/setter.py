# SPDX-License-Identifier: Apache-2.0
"""A server that changes its own limits and places: `setter.py PORT [WHAT[=VALUE]…]`.

    GET  /           200
    GET  /settings   what its process and its threads have now, as JSON
    GET  /restrict   200 if it can restrict a thread of its own
    POST /answer     the oracle's question

What it does at its start, in this order:

    limit=NAME:SOFT:HARD   setrlimit; an empty value stays as it is
    open=N                 opens N files
    lock=BYTES             locks memory
    memory=BYTES           reserves address space
    oom=N, umask=OCTAL, nice=N, dump=HEX, slack=NS, ionice=CLASS
    bind=CPUS              has a thread that is bound to these CPUs (0+1); one that is not is always there
    batch, policy          has a thread with SCHED_BATCH; sets a NUMA policy for new memory
    sockets                has a listening socket, a connection and a UDP socket with options that CRIU loses
    landlock, key, session has a thread that restricts itself; adds a key; joins a new session keyring
    child-landlock         runs a child that restricts itself and ends
    pressure=PATH          waits for pressure: a trigger of psi(7)
"""

import contextlib
import ctypes
import http.server
import json
import mmap
import os
import resource
import socket
import sys
import threading
from pathlib import Path
from typing import Any

import psutil

PORT = int(sys.argv[1])
libc = ctypes.CDLL(None, use_errno=True)
kept: list[object] = []
threads: dict[str, int] = {}
SET_MEMPOLICY, MPOL_BIND, PR_SET_TIMERSLACK, PR_GET_SECUREBITS = 238, 2, 29, 27


def run(name: str, *begin: Any) -> None:
    """Start a thread that calls something and stays."""
    started = threading.Event()

    def body() -> None:
        for function, *arguments in begin:
            function(*arguments)
        threads[name] = threading.get_native_id()
        started.set()
        threading.Event().wait()

    threading.Thread(target=body, daemon=True).start()
    assert started.wait(10)


def limit(value: str) -> None:
    name, *wanted = value.split(":")
    number = getattr(resource, f"RLIMIT_{name.upper()}")
    soft, hard = (int(new or old) for new, old in zip(wanted, resource.getrlimit(number), strict=True))
    resource.setrlimit(number, (soft, hard))


def lock(value: str) -> None:
    memory = mmap.mmap(-1, int(value), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    kept.append(memory)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(int(value))) == 0


def do(what: str, value: str) -> None:
    match what:
        case "limit":
            limit(value)
        case "open":
            kept.extend(open(os.devnull) for _ in range(int(value)))
        case "lock":
            lock(value)
        case "memory":
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
            kept.append(mmap.mmap(-1, int(value), flags=flags))
        case "oom":
            Path("/proc/self/oom_score_adj").write_text(value)
        case "umask":
            os.umask(int(value, 8))
        case "nice":
            os.setpriority(os.PRIO_PROCESS, 0, int(value))
        case "dump":
            Path("/proc/self/coredump_filter").write_text(value)
        case "slack":
            libc.prctl(PR_SET_TIMERSLACK, ctypes.c_ulong(int(value)))
        case "ionice":
            psutil.Process().ionice(int(value))
        case "bind":
            run("bound", (os.sched_setaffinity, 0, map(int, value.split("+"))))
        case "batch":
            run("batch", (os.sched_setscheduler, 0, os.SCHED_BATCH, os.sched_param(0)))
        case "policy":
            assert libc.syscall(SET_MEMPOLICY, MPOL_BIND, (ctypes.c_ulong * 1)(1), 64) == 0
        case "sockets":
            open_sockets()
        case "landlock":
            run("landlocked", (restrict,))
        case "child-landlock":
            run_restricted_child()
        case "key":
            serial = libc.syscall(ADD_KEY, b"user", b"setter", b"secret", 6, KEY_SPEC_PROCESS_KEYRING)
            assert serial > 0
        case "session":
            assert libc.syscall(KEYCTL, KEYCTL_JOIN_SESSION_KEYRING, None) > 0
        case "pressure":
            file = open(value, "r+b", buffering=0)
            file.write(b"some 500000 2000000\0")
            kept.append(file)
        case _:
            raise ValueError(what)


ADD_KEY, KEYCTL = 248, 250
KEY_SPEC_PROCESS_KEYRING, KEYCTL_JOIN_SESSION_KEYRING = -2, 1
LANDLOCK_CREATE_RULESET, LANDLOCK_RESTRICT_SELF, PR_SET_NO_NEW_PRIVS = 444, 446, 38


def restrict() -> None:
    """Forbid making device nodes, and anything that a newer Landlock counts to it."""
    attributes = ctypes.c_uint64(1 << 11)
    ruleset = libc.syscall(LANDLOCK_CREATE_RULESET, ctypes.byref(attributes), 8, 0)
    assert ruleset >= 0
    assert libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
    assert libc.syscall(LANDLOCK_RESTRICT_SELF, ruleset, 0) == 0
    os.close(ruleset)


def run_restricted_child() -> None:
    if os.fork() == 0:
        restrict()
        os._exit(0)
    os.wait()


OPTIONS = {
    "listening": {"TCP_DEFER_ACCEPT": 31, "TCP_FASTOPEN": 16, "TCP_USER_TIMEOUT": 12345, "TCP_MAXSEG": 1000},
    "connection": {
        "TCP_USER_TIMEOUT": 54321,
        "TCP_NOTSENT_LOWAT": 16384,
        "TCP_KEEPIDLE": 33,
        "IP_RECVTOS": 1,
    },
    "udp": {"IP_TOS": 16, "IP_RECVTOS": 1},
}
sockets: dict[str, socket.socket] = {}


def open_sockets() -> None:
    sockets["listening"] = socket.create_server(("127.0.0.1", 0))
    sockets["connection"] = socket.create_connection(sockets["listening"].getsockname())
    sockets["udp"] = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    kept.append(sockets["listening"].accept())
    for name, options in OPTIONS.items():
        for option, value in options.items():
            sockets[name].setsockopt(level(option), getattr(socket, option), value)
    sockets["listening"].setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")


def level(option: str) -> int:
    return socket.IPPROTO_TCP if option.startswith("TCP_") else socket.IPPROTO_IP


def options() -> dict[str, dict[str, object]]:
    found: dict[str, dict[str, object]] = {
        name: {option: sock.getsockopt(level(option), getattr(socket, option)) for option in OPTIONS[name]}
        for name, sock in sockets.items()
    }
    if sockets:
        congestion = sockets["listening"].getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)
        found["listening"]["congestion"] = congestion.rstrip(b"\0").decode()
    return found


def settings() -> dict[str, Any]:
    old = os.umask(0)
    os.umask(old)
    names = [name for name in dir(resource) if name.startswith("RLIMIT_")]
    return {
        "limits": {name: resource.getrlimit(getattr(resource, name)) for name in names},
        "oom": int(Path("/proc/self/oom_score_adj").read_text()),
        "umask": f"{old:03o}",
        "dump": Path("/proc/self/coredump_filter").read_text().strip(),
        "sockets": options(),
        "credentials": credentials(),
        "personality": int(Path("/proc/self/personality").read_text(), 16),
        "threads": {name: thread(tid) for name, tid in {"main": os.getpid(), **threads}.items()},
    }


def credentials() -> dict[str, Any]:
    status = Path("/proc/self/status").read_text().splitlines()
    lines = {name: value.strip() for name, _, value in (line.partition(":") for line in status)}
    return {
        "gid": os.getegid(),
        "groups": sorted(os.getgroups()),
        "no_new_privs": int(lines["NoNewPrivs"]),
        "securebits": libc.prctl(PR_GET_SECUREBITS, 0, 0, 0, 0),
        "ambient": int(lines["CapAmb"], 16),
    }


def thread(tid: int) -> dict[str, Any]:
    return {
        "cpus": sorted(os.sched_getaffinity(tid)),
        "nice": os.getpriority(os.PRIO_PROCESS, tid),
        "policy": os.sched_getscheduler(tid),
        "ionice": int(psutil.Process(tid).ionice().ioclass),
        "slack": int(Path(f"/proc/{tid}/timerslack_ns").read_text()),
    }


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/restrict":
            restrict()  # this connection's thread alone
        self.reply(settings() if self.path == "/settings" else "ready")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.reply({"answer": 42, "asked": body.decode()})

    def reply(self, value: object) -> None:
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def main() -> None:
    run("free")
    for word in sys.argv[2:]:
        what, _, value = word.partition("=")
        do(what, value)
    http.server.ThreadingHTTPServer(("127.0.0.1", PORT), Handler).serve_forever()


if __name__ == "__main__":
    main()
