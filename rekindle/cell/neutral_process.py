# SPDX-License-Identifier: Apache-2.0
"""Runs in the server's own Python: import what it imports, wait for a command, then be that command.

`rekindle.cell.neutral` puts a copy into a cell, and a snapshot saves the process while it waits. Once it is
restored, it gets the arguments, the environment and the directory of today, and runs the program.

Children that `multiprocessing` spawns would import everything again, one after the other. So before anything
else the process forks one that stays as it is, and each child is forked from that. To the program it is a
spawned child as any other: a copy of nothing that the program has done, its own child, with the descriptors
that it was given.

    plan.json       {"files": [...], "script": PATH}: the files that the server has opened, in order, and the
                    program whose place this is
    waiting.json    written once it waits: {"variables", "failed", "seconds"}
    command.json    {"argv", "environment", "directory", "umask"}: what it waits for

Runs on Python 3.9 and later, and imports nothing at first that Python would not load anyway.
"""

import os
import sys
import time

if False:  # what mypy alone reads
    from typing import Any

_POLL_SECONDS = 0.002
_PR_SET_CHILD_SUBREAPER = 36
_ZYGOTE_FD_FROM = 900  # far from the descriptors that a program may count on


def main(directory: str) -> None:
    """Import, wait, and become the program."""
    import json

    with open(f"{directory}/plan.json") as plan_file:
        plan = json.load(plan_file)
    sys.path[0] = os.path.dirname(os.path.realpath(plan["script"]))
    began = time.monotonic()
    with open("/proc/self/environ", "rb") as file:
        started_with = {os.fsdecode(each.partition(b"=")[0]) for each in file.read().split(b"\0")}
    of_python = {name: value for name, value in os.environ.items() if name not in started_with}  # PEP 538
    watched: Any = _watch_environment()
    failed = _import(_modules(plan["files"]))
    os.environ.__class__ = _Plain
    _freeze()
    facts = {
        "variables": sorted(watched.names),
        "copied": watched.copied,
        "failed": failed,
        "seconds": time.monotonic() - began,
    }
    with open(f"{directory}/waiting.tmp", "w") as waiting_file:
        json.dump(facts, waiting_file)
    os.rename(f"{directory}/waiting.tmp", f"{directory}/waiting.json")
    command = f"{directory}/command.json"
    while not os.path.exists(command):
        time.sleep(_POLL_SECONDS)
    with open(command) as command_file:
        given = json.load(command_file)
    os.unlink(command)
    given["environment"] = {**of_python, **given["environment"]}
    _become(given)


_Plain = type(os.environ)


class _Watched(_Plain):  # type: ignore[misc, valid-type]
    """The environment while modules are imported: it notes which variables they read."""

    names = frozenset()  # type: ignore[var-annotated]
    copied = False

    def __getitem__(self, key):  # type: ignore[no-untyped-def]
        _note(key)
        return super().__getitem__(key)

    def __contains__(self, key):  # type: ignore[no-untyped-def]
        _note(key)
        return super().__contains__(key)

    def __iter__(self):  # type: ignore[no-untyped-def]
        _Watched.copied = True
        return super().__iter__()


def _note(key) -> None:  # type: ignore[no-untyped-def]
    if isinstance(key, (str, bytes)):
        _Watched.names |= {os.fsdecode(key)}


def _watch_environment() -> type:
    os.environ.__class__ = _Watched
    return _Watched


def _modules(files: list) -> list:  # type: ignore[type-arg]
    """Return the names of the modules that files hold, in the same order.

    A source counts only where Python has no cached module of it, which it would have read instead: programs
    read sources for other reasons.
    """
    import importlib.machinery
    import importlib.util

    roots = sorted({os.path.realpath(entry) + "/" for entry in sys.path if entry}, key=len, reverse=True)
    found: dict = {}  # type: ignore[type-arg]
    for path in files:
        directory, name = os.path.split(path)
        if name.endswith(".pyc"):
            if os.path.basename(directory) != "__pycache__":
                continue
            stem, _, tag = name[:-4].partition(".")
            if tag.split(".")[0] != sys.implementation.cache_tag:
                continue
            directory = os.path.dirname(directory)
        elif name.endswith(".py"):
            stem = name[:-3]
            if os.path.exists(importlib.util.cache_from_source(path)):
                continue
        else:
            suffix = next(
                (each for each in importlib.machinery.EXTENSION_SUFFIXES if name.endswith(each)), ""
            )
            if not suffix:
                continue
            stem = name[: -len(suffix)]
        root = next((each for each in roots if (directory + "/").startswith(each)), None)
        if root is None:
            continue
        parts = [part for part in (directory + "/")[len(root) :].split("/") if part]
        parts += [] if stem == "__init__" else [stem]
        if parts and parts[-1] != "__main__" and all(part.isidentifier() for part in parts):
            found[".".join(parts)] = None
    return list(found)


def _import(names: list) -> dict:  # type: ignore[type-arg]
    """Import modules in order; return those that cannot be, with the reason: a start may do without them."""
    import importlib

    failed = {}
    for name in names:
        if name not in sys.modules:
            try:
                importlib.import_module(name)
            except BaseException as error:
                failed[name] = f"{type(error).__name__}: {error}"[:200]
    return failed


def _freeze() -> None:
    """Take what was imported out of the garbage collector's sight, which would write to all of its pages."""
    import gc

    gc.collect()
    gc.freeze()


def _become(given: dict) -> None:  # type: ignore[type-arg]
    """Take the surroundings of today, and run the program."""
    import types

    _take_environment(given["environment"])
    os.umask(given["umask"])
    os.chdir(given["directory"])
    _renew()
    _serve_spawns()
    argv = given["argv"]
    script, sys.argv[:] = argv[0], argv
    sys.path[0] = os.path.dirname(os.path.realpath(script))
    main_module = types.ModuleType("__main__")
    main_module.__file__ = script
    main_module.__builtins__ = __builtins__  # type: ignore[attr-defined]
    sys.modules["__main__"] = main_module
    with open(script, "rb") as file:
        code = compile(file.read(), script, "exec")
    exec(code, main_module.__dict__)  # noqa: S102 - the server's program


def _take_environment(environment: dict) -> None:  # type: ignore[type-arg]
    for name in set(os.environ) - set(environment):
        del os.environ[name]
    os.environ.update(environment)


def _renew() -> None:
    """Make new what a start makes new: random numbers, the names of temporary files, line buffering."""
    for name in ("random", "numpy.random"):
        if (module := sys.modules.get(name)) is not None:
            module.seed()
    if (tempfile := sys.modules.get("tempfile")) is not None:
        tempfile._name_sequence = tempfile.tempdir = None  # type: ignore[attr-defined]
    if (ssl := sys.modules.get("_ssl")) is not None:
        ssl.RAND_add(os.urandom(64), 64.0)
    if hasattr(time, "tzset"):
        time.tzset()
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(line_buffering=os.isatty(1))


# Children that are spawned


def _serve_spawns() -> None:
    """Fork the process that children are forked from, and send it what is to be spawned from now on."""
    import multiprocessing.util
    import socket

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    parent = os.getpid()
    zygote = os.fork()
    if not zygote:
        ours.close()
        _zygote(theirs, parent)
    theirs.close()
    kept = _high(ours)
    original = multiprocessing.util.spawnv_passfds

    def spawnv_passfds(path, args, passfds):  # type: ignore[no-untyped-def]
        """Start a child of multiprocessing by the zygote, all else as ever."""
        words = [os.fsdecode(each) for each in args]
        ours = os.getpid() == parent and os.fsdecode(path) == sys.executable
        if not ours or words[-1] != "--multiprocessing-fork":
            return original(path, args, passfds)
        pid = _ask(kept, words, passfds)
        return original(path, args, passfds) if pid is None else pid

    multiprocessing.util.spawnv_passfds = spawnv_passfds


def _high(sock: "Any") -> "Any":
    """Return a socket with a descriptor that is far from those that a program may count on."""
    import fcntl
    import socket

    high = fcntl.fcntl(sock.fileno(), fcntl.F_DUPFD_CLOEXEC, _ZYGOTE_FD_FROM)
    sock.close()
    return socket.socket(fileno=high)


def _ask(sock, args: list, passfds):  # type: ignore[no-untyped-def, type-arg]
    """Have a child forked; return its PID, None if the zygote is gone.

    It is orphaned by the process between, and comes to us, its nearest subreaper.
    """
    import ctypes
    import json
    import signal
    import socket
    import struct

    libc = ctypes.CDLL(None)
    was = ctypes.c_int(0)
    libc.prctl(37, ctypes.byref(was), 0, 0, 0)  # PR_GET_CHILD_SUBREAPER
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        fds = [0, 1, 2, *passfds]
        umask = os.umask(0)
        os.umask(umask)
        request = {
            "args": args,
            "fds": fds,
            "environment": dict(os.environ),
            "directory": os.getcwd(),
            "umask": umask,
            "blocked": [int(each) for each in signal.pthread_sigmask(signal.SIG_BLOCK, [])],
            "ignored": [each for each in range(1, signal.NSIG) if _handler(signal, each) is signal.SIG_IGN],
        }
        memory = os.memfd_create("spawn")
        with open(memory, "w+b", buffering=0) as file:
            file.write(json.dumps(request).encode())
            socket.send_fds(sock, [b"spawn"], [file.fileno(), *fds])
        answer = sock.recv(8)
        return struct.unpack("q", answer)[0] if len(answer) == 8 else None
    except OSError:
        return None
    finally:
        libc.prctl(_PR_SET_CHILD_SUBREAPER, was.value, 0, 0, 0)


def _handler(signal, number: int):  # type: ignore[no-untyped-def]
    try:
        return signal.getsignal(number)
    except ValueError:
        return None


def _zygote(sock, parent: int) -> None:  # type: ignore[no-untyped-def]
    """Fork a child for each request, until the parent is gone."""
    import ctypes
    import signal
    import socket

    ctypes.CDLL(None).prctl(1, int(signal.SIGKILL), 0, 0, 0)  # PR_SET_PDEATHSIG
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)  # what goes to the whole group is not for us
    sock = _high(sock)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)  # a reader of the program's output must see its end
    os.close(null)
    while os.getppid() == parent:
        message, fds, _, _ = socket.recv_fds(sock, 16, 253)
        if not message:
            break
        between = os.fork()
        if not between:
            _between(sock, fds, parent)
        for fd in fds:
            os.close(fd)
        os.waitpid(between, 0)
    os._exit(0)


def _between(sock, fds: list, parent: int) -> None:  # type: ignore[no-untyped-def, type-arg]
    """Fork the child and end, so that it is the parent's."""
    import struct

    if os.fork():
        os._exit(0)
    while os.getppid() != parent:  # which is a subreaper until it hears from us
        time.sleep(0.0005)
    sock.send(struct.pack("q", os.getpid()))
    sock.close()
    _child(fds)  # ends by SystemExit, so that what is registered for the end of Python is called


def _child(fds: list) -> None:  # type: ignore[type-arg]
    """Be a spawned child: its descriptors at their places, its surroundings, and then its work."""
    import fcntl
    import json
    import signal
    from multiprocessing import spawn

    with open(fds[0], "rb") as file:
        file.seek(0)
        request = json.load(file)
    wanted = request["fds"]
    apart = [fcntl.fcntl(fd, fcntl.F_DUPFD, max(_ZYGOTE_FD_FROM, *wanted) + 1) for fd in fds[1:]]
    for fd in fds[1:]:
        os.close(fd)
    for fd, place in zip(apart, wanted):  # noqa: B905 - Python 3.9
        os.dup2(fd, place, inheritable=True)
        os.close(fd)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in request["ignored"]:
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, request["blocked"])
    _take_environment(request["environment"])
    os.umask(request["umask"])
    os.chdir(request["directory"])
    _renew()
    _serve_spawns()
    words = request["args"]
    code = words[words.index("-c") + 1]
    sys.argv[:] = ["-c", *words[words.index("-c") + 2 :]]
    arguments = dict(
        each.split("=") for each in code[code.index("(") + 1 : code.rindex(")")].replace(" ", "").split(",")
    )
    numbers: dict = {name: None if each == "None" else int(each) for name, each in arguments.items()}  # type: ignore[type-arg]
    spawn.spawn_main(**numbers)


if __name__ == "__main__":
    main(os.path.dirname(os.path.abspath(__file__)))
