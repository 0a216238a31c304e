# SPDX-License-Identifier: Apache-2.0
"""Restore from a dump whose memory is still being fetched, by a filler that all restores share."""

import contextlib
import json
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from oci.image import Image
from oci.options import RegistryOptions
from oci.reference import RegistryReference
from rekindle import errors
from rekindle.errors import BusyError, FormatError, IntegrityError, RekindleError, RestoreError
from rekindle.files import remove_tree, try_lock
from rekindle.home import Home
from rekindle.os_errors import naming_full_disk
from rekindle.report import LazyUse, Report
from rekindle.run import spawn
from restore import dumps
from restore.decide.source import Source
from restore.lazy.order import MESSAGE_BYTES, Order, Places
from restore.options import Lazy, Memory, Options

_LEAST_BYTES = 32 << 20
"""Of memory layers: smaller ones are here sooner than a filler has started."""

_CONNECT_SECONDS = 30.0
_POLL_SECONDS = 0.02
_ASK_SECONDS = 5.0


class LazyMemory:
    """The memory files of an image, shown by `mount` whether they are here or not.

    `tree` is the rest of the dump, until `restored` is called. If the memory cannot be had any more,
    `failure` is set and `kill` is called: nothing that has it mapped may run on.
    """

    def __init__(self, sock: socket.socket, tree: Path, mount: int, place: Path) -> None:
        self.tree, self.mount = tree, mount
        self.failure: RekindleError | None = None
        self._sock, self._place = sock, place
        self._kill: Callable[[], None] = lambda: None
        self._answers: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._over = threading.Event()
        self._closing = False
        self.completed = threading.Event()
        self._lock = threading.Lock()
        threading.Thread(target=self._listen, name="lazy", daemon=True).start()

    def watch(self, kill: Callable[[], None]) -> None:
        """Call `kill` when the memory cannot be had any more, from another thread."""
        with self._lock:
            self._kill = kill
            failed = self.failure is not None
        if failed:
            kill()

    def restored(self) -> None:
        """Say that the files of the dump are not needed by their paths any more."""
        self._say({"restored": True})

    def whole(self, _: Path) -> Path:
        """Wait until all of the memory is here; return the dump, which is an ordinary one now."""
        self.restored()
        while not self.completed.wait(_POLL_SECONDS):
            self.check()
        if not self._place.is_dir():
            raise BusyError(f"{self._place} was not made, since another restore makes it", hint="try again")
        return self._place

    @property
    def dump(self) -> Path | None:
        """The dump as an ordinary one; None as long as not all of it is here."""
        return self._place if self.completed.is_set() and self._place.is_dir() else None

    def check(self, seconds: float = 0.0) -> None:
        """Raise the error after which the memory cannot be had any more; wait so long for one."""
        self._over.wait(seconds)
        if self.failure is not None:
            raise self.failure

    def how_far(self) -> LazyUse | None:
        """Return what has been fetched so far; None if the filler does not answer."""
        self._say({"how far": True})
        with contextlib.suppress(queue.Empty):
            answer = self._answers.get(timeout=_ASK_SECONDS)
            return LazyUse(fetched_bytes=answer["fetched"], is_complete=answer["complete"])
        return None

    def close(self) -> None:
        """Leave the filler, which ends when nobody needs it."""
        self._closing = True
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._over.wait(_ASK_SECONDS)
        self._sock.close()
        os.close(self.mount)

    def _say(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):
            self._sock.send(json.dumps(message).encode())

    def _listen(self) -> None:
        try:
            while True:
                try:
                    content = self._sock.recv(MESSAGE_BYTES)
                except OSError:
                    content = b""
                if self._closing:
                    return
                match json.loads(content or b"{}"):
                    case {"complete": float()}:
                        self.completed.set()
                    case {"fetched": int()} as answer:
                        self._answers.put(answer)
                    case {"error": dict()} as message:
                        self._fail(_error(message))
                        return
                    case _:
                        cause = "the process that fetches it has ended"
                        self._fail(
                            RestoreError("the memory of the server cannot be had any more", cause=cause)
                        )
                        return
        finally:
            self._over.set()

    def _fail(self, error: RekindleError) -> None:
        with self._lock:
            self.failure = error
            kill = self._kill
        with contextlib.suppress(OSError):
            kill()
        self._say({"ended": True})


@contextlib.contextmanager
def opened(options: Options, source: Source, home: Home, report: Report) -> Iterator[LazyMemory | None]:
    """Yield the memory of an image that is not here yet; None if all of the dump should be fetched first."""
    image = source.image.value
    if not _is_worth_it(options, source, home):
        yield None
        return
    with contextlib.ExitStack() as stack:
        places = Places(home.dumps / f"{image.process.digest.hex}.lazy")
        sock, mount, problem = _connected(places, source, options.registry, home, report, stack)
        if problem is not None:
            report.say(f"all of the image is fetched before the server starts: {problem}")
            stack.close()
            yield None
            return
        memory = LazyMemory(sock, places.tree, mount, dumps.place(home, image))
        stack.callback(memory.close)
        yield memory


def _is_worth_it(options: Options, source: Source, home: Home) -> bool:
    image = source.image.value
    memory = [layer for layer in image.layers if layer.is_memory]
    has_blocks = {each.layer for each in image.record.dump.blocks} >= {layer.digest for layer in memory}
    least = 0 if options.lazy is Lazy.ALWAYS else _LEAST_BYTES
    return (
        options.lazy is not Lazy.NEVER
        and isinstance(source.reference, RegistryReference)
        and options.memory is Memory.MAP
        and not options.paranoid
        and bool(memory)
        and has_blocks
        and sum(layer.size for layer in memory) >= least
        and not image.record.process.cuda_pids  # whose driver reads all of it at once
        and not dumps.is_ready(home, image)
        and not dumps.has_memory(home, image)
        and not dumps.kept_layers(home, image)
    )


def _connected(
    places: Places,
    source: Source,
    registry: RegistryOptions,
    home: Home,
    report: Report,
    stack: contextlib.ExitStack,
) -> tuple[socket.socket, int, str | None]:
    """Return a connection to the filler, and its mount; or the reason why there is none.

    Raises the error of a filler that failed.
    """
    sock = _begin(places, source, registry, home, report, stack)
    with report.phase("memory"):
        while True:
            content, fds, _, _ = socket.recv_fds(sock, MESSAGE_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
            match json.loads(content or b"{}"):
                case {"here": True} if fds:
                    return sock, fds[0], None
                case {"error": dict(), "lazy": False} as message:
                    error = _error(message)
                    return sock, -1, ": ".join(filter(None, (error.message, error.cause)))
                case {"error": dict()} as message:
                    raise _error(message)
                case _ if not content:
                    return sock, -1, "the process that fetches it has ended"


def _begin(
    places: Places,
    source: Source,
    registry: RegistryOptions,
    home: Home,
    report: Report,
    stack: contextlib.ExitStack,
) -> socket.socket:
    """Start a filler and unpack all but the memory, or connect to the filler that there is."""
    deadline = time.monotonic() + _CONNECT_SECONDS
    while True:
        lock = os.open(places.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        with contextlib.closing(open(lock, "rb", buffering=0)):
            if try_lock(lock):
                with naming_full_disk(home.root):
                    return _start(places, lock, source, registry, home, report, stack)
        with contextlib.suppress(OSError), places.short() as place:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            stack.callback(sock.close)
            sock.connect(f"{place}/{places.socket.name}")
            return sock
        if time.monotonic() > deadline:
            raise BusyError(f"another restore holds {places.lock}, and no process serves its memory")
        time.sleep(_POLL_SECONDS)


def _start(
    places: Places,
    lock: int,
    source: Source,
    registry: RegistryOptions,
    home: Home,
    report: Report,
    stack: contextlib.ExitStack,
) -> socket.socket:
    image = source.image.value
    remove_tree(places.directory)  # of a filler that was killed
    dumps.make_room(home, image, places.directory.name)
    for path in (places.directory, places.tree, places.mount):
        path.mkdir(mode=0o700)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    stack.callback(ours.close)
    with theirs:
        order = Order(
            home=str(home.root),
            directory=str(places.directory),
            image=json.dumps(image.to_json()),
            reference=str(source.reference),
            registry=registry,
            socket=theirs.fileno(),
            kept=(lock,),
        )
        with open(os.memfd_create("order"), "w+b", buffering=0) as file:
            file.write(order.to_bytes())
            file.seek(0)
            spawn(
                [sys.executable, "-m", "restore.lazy.filler"],
                stdin=file.fileno(),
                stderr=2,
                pass_fds=[theirs.fileno(), lock],
            )
    with report.phase("unpack"):
        _unpack_rest(image, places.tree, report)
    with contextlib.suppress(OSError):
        ours.send(json.dumps({"unpacked": True}).encode())
    return ours


def _unpack_rest(image: Image, tree: Path, report: Report) -> None:
    """Unpack all but the memory, in place: nothing uses it before it is complete."""
    from oci.dump_layers import unpack, workers

    while True:
        try:
            report.bytes.written = unpack(
                image.blobs,
                dumps.own_layers(image),
                dumps.own_files(image),
                tree,
                workers=workers(),
                limits=image.limits,
            )
            return
        except (IntegrityError, FormatError):
            for top in ("criu", "shm"):
                remove_tree(tree / top)
            if not image.blobs.fall_back_to_origin():
                raise


def _error(message: dict[str, Any]) -> RekindleError:
    """Return the error that a filler has told."""
    told = message["error"]
    kind = getattr(errors, str(message.get("kind")), RestoreError)
    if not (isinstance(kind, type) and issubclass(kind, RekindleError)):
        kind = RestoreError
    return kind(told["message"], cause=told["cause"], hint=told["hint"])
