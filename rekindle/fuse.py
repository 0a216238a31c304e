# SPDX-License-Identifier: Apache-2.0
"""A directory of files of fixed sizes whose bytes this process provides (FUSE), mounted nowhere.

The mount is a descriptor: whoever gets it can attach it to a mount namespace, and nobody else sees it. So a
process that is killed leaves no mount behind; where it is attached, every read then fails (ENOTCONN).

Speaks the protocol of /dev/fuse itself. The bindings on PyPI need libfuse on the node, one of them a compiler
as well, and what is needed here are ten short messages: see docs/adr/0037-lazy-start.md.

Sources: include/uapi/linux/fuse.h and fs/fuse of Linux; fsopen(2), fsmount(2), open_tree(2), move_mount(2).
"""

import contextlib
import ctypes
import errno
import os
import select
import stat
import struct
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Self

_DEVICE = "/dev/fuse"
_MAJOR, _MINOR = 7, 31  # Linux 5.4
_BUFFER_BYTES = (1 << 20) + 4096
_MAX_PAGES = 256
_FOREVER_SECONDS = 1 << 30
_ROOT_NODE = 1

_LOOKUP, _FORGET, _GETATTR, _OPEN, _READ, _STATFS, _RELEASE = 1, 2, 3, 14, 15, 17, 18
_FLUSH, _INIT, _OPENDIR, _READDIR, _RELEASEDIR = 25, 26, 27, 28, 29
_ACCESS, _INTERRUPT, _DESTROY, _BATCH_FORGET = 34, 36, 38, 42
_SILENT = {_FORGET, _BATCH_FORGET, _INTERRUPT}
_EMPTY = {_RELEASE, _FLUSH, _RELEASEDIR, _ACCESS, _DESTROY, _READDIR}
_ASYNC_READ, _PARALLEL_DIRECTORIES, _USES_MAX_PAGES = 1 << 0, 1 << 18, 1 << 22
_KEEP_CACHE = 1 << 1

_REQUEST = struct.Struct("=IIQQIIIHH")
_ANSWER = struct.Struct("=IiQ")
_INIT_REQUEST, _INIT_ANSWER = struct.Struct("=IIII"), struct.Struct("=IIIIHHIIHHII6I")
_ATTRIBUTES = struct.Struct("=6Q10I")
_ENTRY, _GETATTR_ANSWER, _OPEN_ANSWER = struct.Struct("=4Q2I"), struct.Struct("=QII"), struct.Struct("=QIi")
_READ_REQUEST = struct.Struct("=QQI")
_STATFS_ANSWER = struct.Struct("=5Q4I6I")

_OPEN_TREE, _MOVE_MOUNT, _FSOPEN, _FSCONFIG, _FSMOUNT = 428, 429, 430, 431, 432  # on every architecture
_CLOEXEC = 1
_SET_FLAG, _SET_STRING, _CREATE = 0, 1, 6
_READ_ONLY, _NO_SUID, _NO_DEVICES = 1, 2, 4
_CLONE, _FROM_EMPTY_PATH, _AT_FDCWD, _DETACH = 1, 4, -100, 2
_libc = ctypes.CDLL(None, use_errno=True)


class File(NamedTuple):
    """A file: its name, without slashes, and its size."""

    name: str
    size: int


class Read(NamedTuple):
    """A request for bytes `offset` to `offset + size` of a file, given by its position in the list."""

    unique: int
    file: int
    offset: int
    size: int


class Directory:
    """The files as a file system. `take` gets the reads, in the thread that runs `serve`.

    Each read must be answered once, from any thread, by `answer` or `refuse`: until then a process waits, and
    not even SIGKILL ends it. `close` ends all that wait. With `readahead_bytes`, the OS kernel asks for more
    than was touched.
    """

    def __init__(
        self, files: Sequence[File], take: Callable[[Read], None], *, readahead_bytes: int = 0
    ) -> None:
        """Mount the files. Raises OSError where FUSE cannot be had."""
        self._files = list(files)
        self._nodes = {file.name.encode(): number for number, file in enumerate(files, _ROOT_NODE + 1)}
        self._take = take
        self._readahead_bytes = readahead_bytes
        self._began = int(time.time())
        self._closing = threading.Lock()
        self._sending = threading.Lock()
        with contextlib.ExitStack() as undo:
            self._fd = os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
            undo.callback(os.close, self._fd)
            self._wake = os.eventfd(0, os.EFD_CLOEXEC)
            undo.callback(os.close, self._wake)
            self.mount = _mount(self._fd)
            undo.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the file system: whoever uses it gets errors. Idempotent; `serve` returns soon after."""
        with self._closing:
            mount, self.mount = self.mount, -1
            if mount >= 0:
                os.close(mount)
                os.eventfd_write(self._wake, 1)

    def serve(self) -> None:
        """Answer the OS kernel until `close`, or until nobody has the mount any more."""
        buffer = bytearray(_BUFFER_BYTES)
        view = memoryview(buffer)
        ready = select.poll()
        ready.register(self._fd, select.POLLIN)
        ready.register(self._wake, select.POLLIN)
        try:
            while self.mount >= 0:
                try:
                    count = os.readv(self._fd, [buffer])
                except BlockingIOError:
                    ready.poll()
                except OSError as error:
                    if error.errno == errno.ENODEV:  # unmounted
                        return
                    if error.errno != errno.ENOENT:  # the reader was interrupted
                        raise
                else:
                    self._dispatch(view[:count])
        finally:
            self.close()
            with self._sending:
                fd, self._fd = self._fd, -1
                os.close(fd)  # ends all that wait for an answer
                os.close(self._wake)

    def descriptors(self) -> list[int]:
        """Return its descriptors: a process that is forked must close them before it touches the files."""
        return [self._fd, self._wake, self.mount]

    def answer(self, read: Read, content: memoryview | bytes) -> None:
        """Give a reader what it asked for; less than that is the end of the file."""
        self._send(read.unique, content)

    def refuse(self, read: Read, error: int = errno.EIO) -> None:
        """Let a read fail. A process that has touched mapped memory gets SIGBUS."""
        self._send(read.unique, error=error)

    def _dispatch(self, message: memoryview) -> None:
        _, operation, unique, node, *_ = _REQUEST.unpack_from(message)
        body = message[_REQUEST.size :]
        if operation == _READ:
            _, offset, size = _READ_REQUEST.unpack_from(body)
            self._take(Read(unique, node - _ROOT_NODE - 1, offset, size))
        elif operation == _INIT:
            self._send(unique, self._init(body))
        elif operation == _LOOKUP:
            number = self._nodes.get(bytes(body).rstrip(b"\0"))
            if number is None:
                self._send(unique, error=errno.ENOENT)
            else:
                entry = _ENTRY.pack(number, 1, _FOREVER_SECONDS, _FOREVER_SECONDS, 0, 0)
                self._send(unique, entry + self._attributes(number))
        elif operation == _GETATTR:
            self._send(unique, _GETATTR_ANSWER.pack(_FOREVER_SECONDS, 0, 0) + self._attributes(node))
        elif operation in {_OPEN, _OPENDIR}:
            self._send(unique, _OPEN_ANSWER.pack(0, _KEEP_CACHE, 0))
        elif operation == _STATFS:
            self._send(unique, _STATFS_ANSWER.pack(0, 0, 0, len(self._files), 0, 4096, 255, 4096, *[0] * 7))
        elif operation in _EMPTY:
            self._send(unique)
        elif operation not in _SILENT:
            self._send(unique, error=errno.ENOSYS)

    def _init(self, body: memoryview) -> bytes:
        _, minor, readahead, flags = _INIT_REQUEST.unpack_from(body)
        flags &= _ASYNC_READ | _PARALLEL_DIRECTORIES | _USES_MAX_PAGES
        readahead = min(readahead, self._readahead_bytes)
        background, congestion = 64, 48
        rest = (4096, 1, _MAX_PAGES, 0, 0, 0, *[0] * 6)  # max_write, time_gran, max_pages …
        return _INIT_ANSWER.pack(_MAJOR, min(minor, _MINOR), readahead, flags, background, congestion, *rest)

    def _attributes(self, node: int) -> bytes:
        if node == _ROOT_NODE:
            size, mode, links = 0, stat.S_IFDIR | 0o700, 2
        else:
            size, mode, links = self._files[node - _ROOT_NODE - 1].size, stat.S_IFREG | 0o600, 1
        times = (self._began,) * 3
        owner = (os.geteuid(), os.getegid())
        return _ATTRIBUTES.pack(node, size, -(-size // 512), *times, 0, 0, 0, mode, links, *owner, 0, 4096, 0)

    def _send(self, unique: int, content: memoryview | bytes = b"", *, error: int = 0) -> None:
        head = _ANSWER.pack(_ANSWER.size + len(content), -error, unique)
        # ENOENT: the reader was interrupted; ENODEV and EBADF: the file system was ended.
        with contextlib.suppress(OSError):
            os.writev(self._fd, [head, content] if content else [head])


def attach(mount: int, place: Path) -> None:
    """Attach a mount to a directory of our mount namespace. Raises OSError."""
    call = (_MOVE_MOUNT, mount, b"", _AT_FDCWD, os.fsencode(place), _FROM_EMPTY_PATH)
    _check(_libc.syscall(*call), f"move_mount {place}")


def detach(place: Path) -> None:
    """Undo `attach`."""
    _libc.umount2(os.fsencode(place), _DETACH)


def another(place: Path) -> int:
    """Return a mount of what is attached to a directory, which can be attached elsewhere. Raises OSError."""
    call = (_OPEN_TREE, _AT_FDCWD, os.fsencode(place), _CLONE | os.O_CLOEXEC)
    return _check(_libc.syscall(*call), f"open_tree {place}")


def _mount(device: int) -> int:
    context = _check(_libc.syscall(_FSOPEN, b"fuse", _CLOEXEC), "fsopen fuse")
    try:
        texts = {"source": "rekindle", "fd": str(device), "rootmode": "40000"}
        texts |= {"user_id": "0", "group_id": "0"}
        for name, value in texts.items():
            call = (_FSCONFIG, context, _SET_STRING, name.encode(), value.encode(), 0)
            _check(_libc.syscall(*call), f"fsconfig {name}")
        for name in ("allow_other", "default_permissions"):
            _check(_libc.syscall(_FSCONFIG, context, _SET_FLAG, name.encode(), None, 0), f"fsconfig {name}")
        _check(_libc.syscall(_FSCONFIG, context, _CREATE, None, None, 0), "mount fuse")
        flags = _READ_ONLY | _NO_SUID | _NO_DEVICES
        return _check(_libc.syscall(_FSMOUNT, context, _CLOEXEC, flags), "fsmount")
    finally:
        os.close(context)


def _check(result: int, what: str) -> int:
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result
