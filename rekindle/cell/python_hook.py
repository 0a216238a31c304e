# SPDX-License-Identifier: Apache-2.0
"""Runs in every Python process of a server in a cell: lets go of NVML, and reseeds random numbers.

Before a dump it shuts down NVIDIA's management library (NVML), and after a restore it reseeds.

`rekindle.cell.hook` puts a copy named rekindle_hook.py into the cell, and `python_site.py` loads it. One
thread waits for a signal that is sent to it alone. It holds no descriptor while it waits, and its name, which
`ps -L` shows, tells rekindle what it has done:

    rekindle TOKEN    has answered the request with this token (also: began after it)
    rekindle!TOKEN    has answered it, but something failed; the traceback is in the server's output

The request is in the file `request` beside this directory: "before-snapshot TOKEN", "shut-down-nvml TOKEN" or
"after-restore TOKEN". What to reseed is in the file `reseed`; with "none", random numbers are left alone.

Programs can take part, by AWS's package `snapshot_restore_py` or without it:

    from rekindle_hook import register_after_restore, register_before_snapshot

Imports only modules that are built into Python, none of which it would not load anyway, and runs on Python
3.9 and later.
"""

import _signal  # type: ignore[import-not-found]
import _thread
import os
import sys

__all__ = ["register_after_restore", "register_before_snapshot"]

SIGNAL = 62
_DIRECTORY = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # noqa: PTH100, PTH120
_SEEDED = ("random", "numpy.random")
_PR_SET_NAME = 15
_NVML_USERS_LIMIT = 100_000
_CLOCK_AND_NODE = slice(8, 10), slice(10, 16)

_before_snapshot: list = []  # type: ignore[type-arg]
_after_restore: list = []  # type: ignore[type-arg]
_answered = ""


def register_before_snapshot(func, *args, **kwargs):  # type: ignore[no-untyped-def]
    """Call a function before each snapshot of this process. The last that was registered is called first."""
    import threading  # noqa: F401 - its first import must not happen in the hook's thread

    _before_snapshot.append((func, args, kwargs))
    return func


def register_after_restore(func, *args, **kwargs):  # type: ignore[no-untyped-def]
    """Call a function after each restore of this process, in the order in which they were registered."""
    import threading  # noqa: F401

    _after_restore.append((func, args, kwargs))
    return func


class _Seeded:
    """Notes whether the program seeds `random` and `numpy.random` with a value of its own.

    With such a seed, each start of the server gives the same numbers, and so must a restored one.
    """

    def __init__(self) -> None:
        self._seeds: dict = {}  # type: ignore[type-arg]
        self.fixed: set = set()  # type: ignore[type-arg]

    def watch(self, name: str, module) -> None:  # type: ignore[no-untyped-def]
        original = module.seed
        self._seeds[name] = original

        def seed(*args, **kwargs):  # type: ignore[no-untyped-def]
            result = original(*args, **kwargs)
            value = [*args, *kwargs.values(), None][0]
            (self.fixed.discard if _is_entropy(value) else self.fixed.add)(name)
            return result

        seed.__name__, seed.__doc__, seed.__module__ = "seed", original.__doc__, name
        seed.__wrapped__ = original  # type: ignore[attr-defined]
        module.seed = seed

    def reseed(self, everything: bool) -> None:
        for name in _SEEDED:
            # One that is just being imported is not watched yet.
            seed = self._seeds.get(name) or getattr(sys.modules.get(name), "seed", None)
            if seed is not None and (everything or name not in self.fixed):
                seed()

    def find_spec(self, name, path=None, target=None):  # type: ignore[no-untyped-def]
        """Find a module as the other finders do; if it is one to watch, do so once it is loaded."""
        if name not in _SEEDED:
            return None
        for finder in sys.meta_path:
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec = find and find(name, path, target)
            if spec is not None:
                self._watch_once_loaded(name, spec.loader)
                return spec
        return None

    def _watch_once_loaded(self, name, loader) -> None:  # type: ignore[no-untyped-def]
        execute = getattr(loader, "exec_module", None)

        def exec_module(module) -> None:  # type: ignore[no-untyped-def]
            del loader.exec_module
            execute(module)  # type: ignore[misc]
            self.watch(name, module)

        if hasattr(loader, "__dict__") and execute is not None:
            loader.exec_module = exec_module


def _is_entropy(value) -> bool:  # type: ignore[no-untyped-def]
    """Tell whether a seed differs from start to start: bytes from the system, a time, a large number."""
    if value is None or isinstance(value, (bytes, bytearray, float)):
        return True
    try:
        return abs(int(value)) >= 1 << 32
    except (TypeError, ValueError):  # a text, a list
        return False


_seeded = _Seeded()


def _reseed() -> None:
    everything = _read("reseed") == "all"
    _seeded.reseed(everything)
    torch = getattr(sys.modules.get("torch"), "default_generator", None)
    if everything and torch is not None:
        torch.seed()
    _reseed_openssl()
    if (tempfile := sys.modules.get("tempfile")) is not None:
        tempfile._name_sequence = None  # type: ignore[attr-defined]
    if hasattr(uuid := sys.modules.get("uuid"), "_generate_time_safe"):
        _renew_uuid(uuid)


def _reseed_openssl() -> None:
    """Reseed every OpenSSL in this process: those that are mapped, `ssl`'s own, and that of `cryptography`.

    RAND_add also makes OpenSSL fetch new entropy from the system, and all its generators notice.
    """
    if (ssl := sys.modules.get("_ssl")) is not None:
        ssl.RAND_add(os.urandom(64), 64.0)
    _reseed_cryptography()
    with open("/proc/self/maps") as maps:
        fields = [line.split(None, 5) for line in maps]
    paths = {each[5].strip() for each in fields if len(each) == 6 and "/libcrypto" in each[5]}
    if paths:
        import _ctypes

        for path in paths:
            name = path[: -len(" (deleted)")] if path.endswith(" (deleted)") else path
            library = _ctypes.dlopen(name, os.RTLD_NOLOAD | os.RTLD_LAZY)
            _ctypes.call_function(_ctypes.dlsym(library, "RAND_seed"), (os.urandom(64), 64))


def _reseed_cryptography() -> None:
    name = "cryptography.hazmat.bindings."
    compiled = getattr(sys.modules.get(name + "_rust"), "_openssl", None)  # since version 40
    lib = getattr(compiled or sys.modules.get(name + "_openssl"), "lib", None)
    if lib is None:
        return
    if not hasattr(lib, "RAND_add"):
        sys.stderr.write("rekindle: cannot reseed the OpenSSL of this version of cryptography\n")
        return
    lib.RAND_add(os.urandom(64), 64, 64.0)


def _renew_uuid(uuid) -> None:  # type: ignore[no-untyped-def]
    """Make uuid1 use another clock sequence, and another node if that is a random number.

    libuuid keeps both for as long as the process lives, so they are changed in what it returns.
    """
    multicast = 1 << 40
    mask = int.from_bytes(os.urandom(6), "big") & ~multicast
    if (getattr(uuid, "_node", None) or 0) & multicast:
        uuid._node ^= mask
    generate = uuid._generate_time_safe
    if generate is None:
        return
    sequence = int.from_bytes(os.urandom(2), "big") & 0x3FFF

    def generate_time_safe():  # type: ignore[no-untyped-def]
        made, safe = generate()
        head, clock, node = made[:8], *(int.from_bytes(made[at], "big") for at in _CLOCK_AND_NODE)
        node ^= mask if node & multicast else 0
        return head + (clock ^ sequence).to_bytes(2, "big") + node.to_bytes(6, "big"), safe

    uuid._generate_time_safe = generate_time_safe


def _shut_down_nvml() -> None:
    """Undo every nvmlInit of this process: until then it holds /dev/nvidiactl, which cannot be dumped.

    NVML counts its users. What needs it later initializes it again, as vLLM and torch do for each question.
    """
    import _ctypes

    try:
        library = _ctypes.dlopen("libnvidia-ml.so.1", os.RTLD_NOLOAD | os.RTLD_LAZY)
    except OSError:  # it was never loaded
        return
    shut_down = _ctypes.dlsym(library, "nvmlShutdown")
    for _ in range(_NVML_USERS_LIMIT):
        if _ctypes.call_function(shut_down, ()):  # NVML_ERROR_UNINITIALIZED
            return


def _read(name: str) -> str:
    # Each call into the OS kernel lets go of the GIL, which a busy thread may keep for long: so no `open`.
    try:
        fd = os.open(f"{_DIRECTORY}/{name}", os.O_RDONLY)
    except OSError:
        return ""
    try:
        return os.read(fd, 4096).decode().strip()
    finally:
        os.close(fd)


def _answer() -> None:
    """Do what the request says, unless that was done already."""
    global _answered
    phase, _, token = _read("request").partition(" ")
    if not token or token == _answered:
        return
    calls: list = []  # type: ignore[type-arg]
    if phase == "after-restore":
        calls += [(_reseed, (), {}), *_of_package("get_after_restore"), *_after_restore]
    elif phase == "shut-down-nvml":
        calls += [(_shut_down_nvml, (), {})]
    else:
        calls += [*_before_snapshot[::-1], *_of_package("get_before_snapshot")[::-1]]
    failed = False
    for func, args, kwargs in calls:
        try:
            func(*args, **kwargs)
        except BaseException:
            failed = True
            sys.excepthook(*sys.exc_info())
    _answered = token
    _name_thread(f"rekindle{'!' if failed else ' '}{token}")


def _of_package(name: str) -> list:  # type: ignore[type-arg]
    registered = getattr(sys.modules.get("snapshot_restore_py"), name, list)
    return list(registered())


def _name_thread(text: str) -> None:
    try:
        fd = os.open("/proc/thread-self/comm", os.O_WRONLY)
        os.write(fd, text.encode())
        os.close(fd)
    except OSError:  # after a change of user, it belongs to root
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_NAME, text.encode(), 0, 0, 0)


def _run(started) -> None:  # type: ignore[no-untyped-def]
    try:
        _signal.pthread_sigmask(_signal.SIG_BLOCK, [SIGNAL])
        _name_thread(f"rekindle {_answered}")
        _answer()  # what came between a fork and the start of this thread
    finally:
        started.release()
    while True:
        _signal.sigwait([SIGNAL])
        _answer()


def _start() -> None:
    """Start the thread, and wait until it opens no file any more: a child may count on free descriptors."""
    started = _thread.allocate_lock()
    started.acquire()
    try:
        _thread.start_new_thread(_run, (started,))
    except RuntimeError:  # no more threads: rekindle tells that this process has no hook
        return
    started.acquire()


if _request := _read("request"):
    _answered = _request.partition(" ")[2]
    if _read("reseed") != "none":
        for _name in _SEEDED:
            if _name in sys.modules:
                _seeded.watch(_name, sys.modules[_name])
        sys.meta_path.insert(0, _seeded)
    os.register_at_fork(after_in_child=_start)
    _start()
