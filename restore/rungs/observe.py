# SPDX-License-Identifier: Apache-2.0
"""What a server does with its kernel caches, seen from outside: which entries it reads, and which it makes.

inotify(7) says so, directory by directory. It tells of files by name, in order, without who and when; it
forgets what comes too fast, and has a number of directories for each user. So what was there at the start
is listed once, what is new is looked at once more when somebody asks, and if anything was lost, what is
there then is compared with the list.
"""

import contextlib
import ctypes
import errno
import fcntl
import math
import os
import posixpath
import select
import stat
import struct
import termios
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path, PurePosixPath
from typing import Self

from oci.cache.inventory import entry_key
from rekindle.engine.caches import CacheKind, leaves_out

_OPEN, _CLOSE_WRITE, _MOVED_TO, _CREATE, _MOVE_SELF = 0x20, 0x08, 0x80, 0x100, 0x800
_OVERFLOW, _IGNORED, _ISDIR = 0x4000, 0x8000, 0x40000000
_ONLYDIR, _DONT_FOLLOW, _EXCL_UNLINK, _MASK_ADD = 0x01000000, 0x02000000, 0x04000000, 0x20000000
_INSIDE = _OPEN | _CLOSE_WRITE | _MOVED_TO | _CREATE | _ONLYDIR | _DONT_FOLLOW | _EXCL_UNLINK | _MASK_ADD
_ABOVE = _MOVED_TO | _CREATE | _MOVE_SELF | _ONLYDIR | _MASK_ADD
_EVENT = struct.Struct("iIII")  # watch, mask, cookie, length of the name

_BUFFER_BYTES = 64 * 1024
_LISTED_AT_ONCE = 256  # directories: each that is listed makes two events itself, and the kernel keeps 16384
_FILES_LIMIT = 1_000_000  # of a cache: a variable may name what is none
_SIFTED_AT = 10_000  # new files: those that are gone again are forgotten
_TURN_SECONDS = 0.1
_PATIENCE_SECONDS = 5.0

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """New files of an entry."""

    files: int
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ObservedRoot:
    """What was seen in one cache, by the keys of its entries as its inventory has them.

    `used`: a file that was there at the start was opened, and not to be written. `made`: files that are new,
    or stand in the place of old ones, were closed after writing or moved in, and are still there. An entry
    may be both: its server looked at it, and found it wanting.
    """

    kind: CacheKind
    path: Path
    used: frozenset[str]
    made: Mapping[str, Made]


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """What was seen in caches, in the order in which they were given, by whomever it was done.

    `made_seconds` is from the first of the new files to the last, 0.0 if there are none. If not `complete`,
    events were lost: then `used` is a lower bound, and `made` comes from comparing what is there, or is one
    too if there are more than a million files.
    """

    roots: Sequence[ObservedRoot]
    made_seconds: float
    complete: bool


class _Look(StrEnum):
    """What the files of a directory are taken for: old, new, or new where they differ from the old."""

    START = "start"
    MADE = "made"
    COMPARE = "compare"


@dataclass(slots=True, eq=False)
class _Tree:
    """A cache, by the paths of its files below it."""

    kind: CacheKind
    path: Path
    real: str
    before: dict[str, int] = field(default_factory=dict)  # inodes of the files that are there since the start
    opened: dict[str, int] = field(default_factory=dict)  # how often such files were, less the writers
    new: dict[str, float] = field(default_factory=dict)  # when
    sifted_at: int = _SIFTED_AT
    too_large: bool = False

    def add_new(self, path: str, when: float) -> None:
        self.before.pop(path, None)
        self.new.setdefault(path, when)
        if len(self.new) > self.sifted_at:
            self.sizes()
            self.sifted_at = max(_SIFTED_AT, 2 * len(self.new))

    def sizes(self) -> dict[str, int]:
        """The new files that are still there, in bytes. Others are forgotten."""
        found = {}
        for path in list(self.new):
            with contextlib.suppress(OSError):
                status = os.lstat(f"{self.real}/{path}")
                if stat.S_ISREG(status.st_mode):
                    found[path] = status.st_size
                    continue
            del self.new[path]
        return found


class Watch:
    """Watches caches for what is opened and what is made in them, from its start to its end as a context.

    A cache need not be there yet, may be a link, and may be removed and made again. Whatever happens, leaving
    the context ends its thread and closes its descriptors; that is also when it looks for the last time.
    Where inotify is not to be had, it compares listings. Raises nothing for what is in a cache.
    """

    def __init__(self, roots: Sequence[tuple[CacheKind, Path]]) -> None:
        self._trees = [_Tree(kind, path, os.path.realpath(path)) for kind, path in roots]
        self._watched: dict[int, dict[_Tree, str]] = {}  # the paths that a watch stands for
        self._above: set[int] = set()  # watches of what is above a cache
        self._pending: list[tuple[_Tree, str, _Look]] = []  # directories to be listed
        self._lock = threading.Lock()
        self._undo = contextlib.ExitStack()
        self._inotify = -1
        self._started = 0.0
        self._lost = False
        self._ended = False
        self._last: Observed | None = None

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as undo:
            wake = -1
            try:
                wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
                undo.callback(os.close, wake)
                self._inotify = _inotify_init()
                undo.callback(os.close, self._inotify)
            except OSError:
                self._lost = True
            self._started = time.monotonic()
            self._pending += [(tree, "", _Look.START) for tree in self._trees]
            self._settle(math.inf)
            thread = threading.Thread(
                target=self._run, args=(self._inotify, wake), name="observe", daemon=True
            )
            if self._inotify >= 0:
                thread.start()
            undo.callback(self._end, thread, wake)
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def observed(self) -> Observed:
        """What was seen up to now, or up to the end. May be asked by any thread, and several times."""
        with self._lock:
            return self._last or self._take_stock()

    def _end(self, thread: threading.Thread, wake: int) -> None:
        try:
            with self._lock:
                self._ended = True  # from here on the thread touches no descriptor
                self._last = self._take_stock()
        finally:
            self._inotify = -1
            if thread.ident is not None:
                os.eventfd_write(wake, 1)
                thread.join()

    def _run(self, *descriptors: int) -> None:
        poll = select.poll()
        for fd in descriptors:
            poll.register(fd, select.POLLIN)
        while True:
            poll.poll(0 if self._pending else None)
            with self._lock:
                if self._ended:
                    return
                self._drain()
                self._settle(_TURN_SECONDS)

    def _take_stock(self) -> Observed:
        self._drain()
        if self._lost:
            self._pending += [(tree, "", _Look.COMPARE) for tree in self._trees if not tree.too_large]
        self._settle(_PATIENCE_SECONDS)
        if self._pending:  # they are made faster than they can be listed
            self._lost = True
        roots, times = [], []
        for tree in self._trees:
            made: dict[str, Made] = {}
            for path, size in tree.sizes().items():
                if key := _key(tree, path):
                    already = made.get(key, Made(files=0, bytes=0))
                    made[key] = Made(files=already.files + 1, bytes=already.bytes + size)
                    times.append(tree.new[path])
            used = {
                _key(tree, path)
                for path, count in tree.opened.items()
                # Its events may be those of the file that took its place.
                if count > 0 and not (self._lost and path in tree.new)
            }
            used.discard("")
            roots.append(ObservedRoot(kind=tree.kind, path=tree.path, used=frozenset(used), made=made))
        seconds = max(times) - min(times) if times else 0.0
        return Observed(roots=tuple(roots), made_seconds=seconds, complete=not self._lost)

    def _drain(self) -> None:
        """Takes the events that are there, and not those that come meanwhile, which may never end."""
        if self._inotify < 0:
            return
        left = int.from_bytes(fcntl.ioctl(self._inotify, termios.FIONREAD, bytes(4)), "little")
        while left > 0:
            content = os.read(self._inotify, _BUFFER_BYTES)
            left -= len(content)
            now = time.monotonic()
            at = 0
            while at < len(content):
                watch, mask, _, length = _EVENT.unpack_from(content, at)
                at += _EVENT.size + length
                self._take(watch, mask, os.fsdecode(content[at - length : at].rstrip(b"\0")), now)

    def _take(self, watch: int, mask: int, name: str, now: float) -> None:
        if mask & _OVERFLOW:
            self._lost = True
        elif mask & (_IGNORED | _MOVE_SELF):
            if mask & _IGNORED:
                self._watched.pop(watch, None)
            if watch in self._above:
                self._above.discard(watch)
                self._pending += [(tree, "", _Look.MADE) for tree in self._trees]
        elif mask & _ISDIR:
            if mask & (_CREATE | _MOVED_TO):
                for tree, inside in self._watched.get(watch, {}).items():
                    self._pending.append((tree, _join(inside, name), _Look.MADE))
                if watch in self._above:
                    on_the_way = [tree for tree in self._trees if f"/{name}/" in f"{tree.real}/"]
                    self._pending += [(tree, "", _Look.MADE) for tree in on_the_way]
        else:
            for tree, inside in self._watched.get(watch, {}).items():
                path = _join(inside, name)
                if mask & _CREATE:
                    tree.before.pop(path, None)
                elif path in tree.before and not mask & _MOVED_TO:
                    tree.opened[path] = max(0, tree.opened.get(path, 0) + (1 if mask & _OPEN else -1))
                elif not mask & _OPEN:
                    tree.add_new(path, now)

    def _settle(self, seconds: float) -> None:
        """Lists the directories that wait for it, for so long at most: they may be made without end."""
        deadline = time.monotonic() + seconds
        count = 0
        while self._pending and time.monotonic() < deadline:
            tree, inside, look = self._pending.pop()
            if not inside:
                self._watch_above(tree)
            if not inside or not leaves_out(tree.kind, PurePosixPath(inside)):
                self._list(tree, inside, look)
            count += 1
            if count % _LISTED_AT_ONCE == 0:
                self._drain()

    def _watch_above(self, tree: _Tree) -> None:
        """Watches the closest directory above a cache, so that the cache is seen when it comes."""
        while True:
            above, inner = posixpath.dirname(tree.real), tree.real
            while (watch := self._add(above, _ABOVE)) is None and above != "/":
                above, inner = posixpath.dirname(above), above
            self._above |= {watch} if watch is not None else set()
            if inner == tree.real or self._add(inner, _ABOVE) is None:  # else it came before the watch did
                return

    def _list(self, tree: _Tree, inside: str, look: _Look) -> None:
        """Watches a directory, and takes what already lies in it."""
        if len(tree.before) > _FILES_LIMIT:
            self._lost = tree.too_large = True
            return
        directory = f"{tree.real}/{inside}" if inside else tree.real
        watch = self._add(directory, _INSIDE)
        if watch is None:
            return
        if look is _Look.MADE and not inside:
            if self._watched.get(watch, {}).get(tree) == "":
                return  # the cache is the one that it was, and something else came beside it
            look = _Look.COMPARE if self._lost else look  # or it was there, and could not be watched
        if watch >= 0:
            self._watched.setdefault(watch, {})[tree] = inside
        try:
            with os.scandir(directory) as entries:
                for entry in entries:
                    path = _join(inside, entry.name)
                    if entry.is_dir(follow_symlinks=False):
                        self._pending.append((tree, path, look))
                    elif entry.is_file(follow_symlinks=False):
                        self._look_at(tree, path, entry, look)
        except OSError as error:
            self._is_gone(error)

    def _look_at(self, tree: _Tree, path: str, entry: os.DirEntry[str], look: _Look) -> None:
        if look is _Look.START:
            if path not in tree.new:
                tree.before[path] = entry.inode()
        elif look is _Look.MADE or tree.before.get(path) != entry.inode():
            with contextlib.suppress(FileNotFoundError):
                age = time.time() - entry.stat(follow_symlinks=False).st_ctime
                tree.add_new(path, max(self._started, time.monotonic() - max(0.0, age)))

    def _add(self, directory: str, mask: int) -> int | None:
        """The watch of a directory, -1 if it cannot be watched, None if it is not there."""
        if self._inotify < 0:
            return -1
        try:
            return _inotify_add_watch(self._inotify, os.fsencode(directory), mask)
        except OSError as error:
            return None if self._is_gone(error) else -1

    def _is_gone(self, error: OSError) -> bool:
        """Whether there is nothing any more, rather than something that cannot be seen."""
        gone = error.errno in {errno.ENOENT, errno.ENOTDIR}
        self._lost |= not gone
        return gone


def _join(inside: str, name: str) -> str:
    return f"{inside}/{name}" if inside else name


def _key(tree: _Tree, path: str) -> str:
    """The entry that a file belongs to, "" for a file that does not count."""
    where = PurePosixPath(path)
    return "" if leaves_out(tree.kind, where) else entry_key(tree.kind, where)


def _inotify_init() -> int:
    return _checked(_libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK))


def _inotify_add_watch(fd: int, directory: bytes, mask: int) -> int:
    return _checked(_libc.inotify_add_watch(fd, directory, mask))


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
