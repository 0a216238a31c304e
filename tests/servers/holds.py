# SPDX-License-Identifier: Apache-2.0
"""What a workhorse holds: what CRIU cannot dump, what only looks like it, and what the remedies give."""

import contextlib
import ctypes
import fcntl
import mmap
import multiprocessing
import os
import pathlib
import select
import signal
import socket
import sqlite3
import struct
import subprocess
import threading
import time
from collections.abc import Callable
from multiprocessing import shared_memory
from typing import Any

libc = ctypes.CDLL(None, use_errno=True)
_USER, _PID, _TIME = 0x10000000, 0x20000000, 0x80  # CLONE_NEW…


def hold_all(words: str, path: str) -> list[object]:
    """Hold what each word says, at paths of their own; with `remedied-` before it, what its remedy gives."""
    found = []
    names = list(filter(None, words.split(",")))
    for name in names:
        place = path if len(names) == 1 else f"{path}-{name}"
        found.append(remedied(name[9:], place) if name.startswith("remedied-") else hold(name, place))
    return found


def remedied(what: str, path: str) -> object:
    """What the server does instead of holding that, if it follows the remedy."""
    below = f"{os.environ['TMPDIR']}/{pathlib.Path(path).name}"
    if what in (
        "vsock",
        "loop",
        "perf",
        "secret",
        "userfaultfd",
        "bpf",
        "landlock-rules",
        "pressure",
        "ghost",
    ):
        closed = hold(what, path)  # close it, end or turn off what has it
        os.close(closed) if isinstance(closed, int) else closed.close()
        return None
    if what == "mptcp":
        return socket.create_server(("127.0.0.1", 0))
    if what == "sysv":
        return multiprocessing.get_context("spawn").Semaphore()
    if what in ("sysv-queue", "queue"):
        return multiprocessing.get_context("spawn").Queue(), os.pipe()
    if what == "sysv-memory":
        return shared_memory.SharedMemory(create=True, size=4096)
    if what == "stdout-of-1":
        return os.open("/dev/stdout", os.O_WRONLY | os.O_APPEND)
    if what in ("unix", "link"):
        return hold(what, below)
    if what == "keys":
        pathlib.Path(below).write_bytes(b"secret")
        return open(below, "rb")
    if what == "epoll":
        return hold("epoll-emptied", path)
    if what == "netlink":
        link = hold("netlink", path)
        link.settimeout(0.2)
        with contextlib.suppress(TimeoutError):
            while True:
                link.recv(1 << 16)
        return link
    if what == "unread":
        listener, client, peer = hold("unread", path)
        peer.settimeout(0.2)
        with contextlib.suppress(TimeoutError):
            while True:
                peer.recv(1 << 20)
        return listener, client, peer
    if what == "multicast":
        idle, member = hold("multicast", path)
        group = socket.inet_aton("239.1.2.3") + socket.inet_aton("127.0.0.1")
        member.setsockopt(socket.IPPROTO_IP, socket.IP_DROP_MEMBERSHIP, group)
        return idle, member
    if what == "multicast-6":
        idle, member = hold("multicast-6", path)
        group = socket.inet_pton(socket.AF_INET6, "ff15::123") + struct.pack("I", 1)
        member.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_LEAVE_GROUP, group)
        return idle, member
    if what == "shell-in-a-terminal":
        return hold("terminal")
    if what == "headless":
        return fork(lambda: threading.Thread(target=time.sleep, args=(1000,), daemon=True).start())
    if what == "files":
        return remedied_files(below, path)
    return fork(lambda: None)  # a process in the foreground and in the server's namespaces, without a sandbox


def remedied_files(below: str, path: str) -> list[object]:
    """Files of the same kinds, as the remedies have them."""
    kept: list[object] = [open(f"{below}-log", "w"), open(f"{below}-large", "w")]
    os.posix_fallocate(kept[1].fileno(), 0, 65 << 20)  # type: ignore[attr-defined]
    os.mkfifo(f"{below}-pipe")
    kept.append(os.open(f"{below}-pipe", os.O_RDWR))
    with contextlib.closing(sqlite3.connect(f"{path}-database")) as database:  # open only when it is used
        database.execute("CREATE TABLE kept (number)")
    locked = os.open(f"{path}-own-lock", os.O_RDWR | os.O_CREAT)  # a file that the server makes
    fcntl.flock(locked, fcntl.LOCK_EX)
    return [*kept, locked]


def hold(what: str, path: str = "") -> Any:
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
        agent.connect(path)
        return agent
    if what in ("watch", "watch-elsewhere"):
        watch = libc.inotify_init()
        place = path if what == "watch" else os.environ["TMPDIR"]
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
        file = open(path, "w")
        file.write("began\n")
        file.flush()
        return file
    if what == "files":
        return hold("log", path), hold_files(path)
    if what == "sysv":
        return libc.semget(0, 1, 0o600)
    if what == "unix":
        server = socket.socket(socket.AF_UNIX)
        server.bind(path)
        return server
    if what == "link":
        file = open(path, "w")
        os.link(path, path + "2")
        os.unlink(path)
        return file
    if what == "loop":
        return open("/dev/loop-control", "rb")
    if what == "perf":
        attributes = ctypes.create_string_buffer(b"\1\0\0\0\x80\0\0\0", 128)  # software, cpu-clock
        return libc.syscall(298, attributes, 0, -1, -1, 0)
    if what == "device":
        return open(path, "rb")
    if what == "device-of-another":
        return fork(lambda: open(path, "rb"))
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
        deleted = os.open(path, os.O_RDWR | os.O_CREAT)
        os.unlink(path)
        os.truncate(deleted, 4 << 30)
        os.write(deleted, b"kept")
        return deleted
    if what == "sysv-queue":
        return libc.msgget(0, 0o600)
    if what == "sysv-memory":
        libc.shmat.restype = ctypes.c_void_p
        return libc.shmat(libc.shmget(0, 4096, 0o600), None, 0)
    if what == "secret":
        memory = libc.syscall(447, 0)
        os.ftruncate(memory, 4096)
        return memory
    if what == "secret-mapped":
        memory = hold("secret")
        mapped = mmap.mmap(memory, 4096)
        os.close(memory)
        return mapped
    if what == "userfaultfd":
        return libc.syscall(323, 1)  # UFFD_USER_MODE_ONLY
    if what == "bpf":
        return libc.syscall(321, 0, struct.pack("5I", 2, 4, 4, 1, 0), 20)  # an array of one
    if what == "landlock-rules":
        return libc.syscall(444, struct.pack("Q", 1), 8, 0)
    if what == "stdout-of-1":
        return os.open("/proc/1/fd/1", os.O_WRONLY)
    if what == "mount-context":
        return libc.syscall(430, b"tmpfs", 0)  # fsopen
    if what == "landlock":
        return fork(restrict)
    if what == "keys":
        return fork(
            lambda: libc.syscall(248, b"user", b"name", b"secret", 6, -2)
        )  # into the process's keyring
    if what == "pressure":
        trigger = os.open("/proc/pressure/memory", os.O_RDWR)
        os.write(trigger, b"some 150000 2000000\0")
        return trigger
    if what == "user-namespace":
        return fork(lambda: libc.unshare(_USER))
    if what == "pid-namespace":
        return fork(lambda: (libc.unshare(_PID), fork(lambda: None)))
    if what == "time-namespace":
        return fork(lambda: (libc.unshare(_TIME), fork(lambda: None)))
    if what == "ghost":
        ghost = os.open(path, os.O_RDWR | os.O_CREAT)
        os.unlink(path)
        os.posix_fallocate(ghost, 0, (1 << 30) + 4096)
        return ghost
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


def restrict() -> None:
    """Restrict this process with Landlock."""
    libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    rules = libc.syscall(444, struct.pack("Q", 1), 8, 0)
    assert libc.syscall(446, rules, 0) == 0
    os.close(rules)
