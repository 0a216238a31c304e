# SPDX-License-Identifier: Apache-2.0
"""Observe which entries of its kernel caches a server reads, and which it makes.

Uses inotify(7), which reports file names of one directory, in order, without process or time. It drops
events that come too fast, and limits the number of directories per user. So the files present at the start
are listed once, new files are checked again when the result is asked for, and if events were lost, the
files present then are compared with the list.
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
from enum import StrEnum
from pathlib import Path, PurePosixPath
from typing import Self

from msgspec import Struct, field

from oci.cache.inventory import entry_key
from rekindle.engine.caches import CacheKind, is_left_out

_OPEN, _CLOSE_WRITE, _MOVED_TO, _CREATE, _MOVE_SELF = 0x20, 0x08, 0x80, 0x100, 0x800
_OVERFLOW, _IGNORED, _ISDIR = 0x4000, 0x8000, 0x40000000
_ONLYDIR, _DONT_FOLLOW, _EXCL_UNLINK, _MASK_ADD = 0x01000000, 0x02000000, 0x04000000, 0x20000000
_INSIDE = _OPEN | _CLOSE_WRITE | _MOVED_TO | _CREATE | _ONLYDIR | _DONT_FOLLOW | _EXCL_UNLINK | _MASK_ADD
_ABOVE = _MOVED_TO | _CREATE | _MOVE_SELF | _ONLYDIR | _MASK_ADD
_EVENT = struct.Struct("iIII")  # watch, mask, cookie, length of the name

_BUFFER_BYTES = 64 * 1024
_LISTED_AT_ONCE = 256  # directories: listing one causes two events, and the OS kernel queues 16384
_FILES_LIMIT = 1_000_000  # of a cache: a variable may name a directory that is no cache
_PRUNE_AT = 10_000  # new files: forget those that are gone again
_TURN_SECONDS = 0.1
_LAST_LISTING_SECONDS = 5.0

_libc = ctypes.CDLL(None, use_errno=True)


class Made(Struct, frozen=True, kw_only=True):
    """New files of an entry."""

    files: int
    bytes: int


class ObservedRoot(Struct, frozen=True, kw_only=True):
    """The observations in one cache, by the keys of its entries in the inventory.

    `used`: entries with a file that was present at the start and was opened, but not for writing. `made`:
    entries with files that are new or replace old ones, were closed after writing or moved in, and still
    exist. An entry may be in both: the server read it and then replaced it.
    """

    kind: CacheKind
    path: Path
    used: frozenset[str]
    made: Mapping[str, Made]


class Observed(Struct, frozen=True, kw_only=True):
    """The observations in several caches, in the order in which they were given, by any process.

    `made_seconds` is the time from the first new file to the last, 0.0 if there are none. Unless
    `complete`, events were lost: `used` is then a lower bound, and `made` comes from comparing listings;
    it is a lower bound, too, for more than a million files.
    """

    roots: Sequence[ObservedRoot]
    made_seconds: float
    complete: bool


class _Listed(StrEnum):
    """The treatment of listed files: as old, as new, or as new if they differ from the old ones."""

    OLD = "old"
    NEW = "new"
    COMPARE = "compare"


class _WatchedTree(Struct, eq=False):
    """The state of one cache, by the relative paths of its files."""

    kind: CacheKind
    path: Path
    real: str
    before: dict[str, int] = field(default_factory=dict)  # inodes of the files present since the start
    opened: dict[str, int] = field(default_factory=dict)  # how often those were opened, less for writing
    new: dict[str, float] = field(default_factory=dict)  # when each new file was first seen
    prune_at: int = _PRUNE_AT
    too_large: bool = False

    def add_new(self, path: str, when: float) -> None:
        self.before.pop(path, None)
        self.new.setdefault(path, when)
        if len(self.new) > self.prune_at:
            self.sizes()
            self.prune_at = max(_PRUNE_AT, 2 * len(self.new))

    def sizes(self) -> dict[str, int]:
        """Return the sizes in bytes of the new files that still exist, and forget the others."""
        found = {}
        for path in list(self.new):
            with contextlib.suppress(OSError):
                status = os.lstat(f"{self.real}/{path}")
                if stat.S_ISREG(status.st_mode):
                    found[path] = status.st_size
                    continue
            del self.new[path]
        return found


class CacheWatch:
    """Watch caches within a context for files that are opened or made.

    A cache may not exist yet, may be a link, and may be removed and made again. Leaving the context looks
    for the last time, ends the thread and closes the descriptors, whatever happens. Without inotify,
    listings are compared. No content of a cache makes this raise.
    """

    def __init__(self, roots: Sequence[tuple[CacheKind, Path]]) -> None:
        self._trees = [_WatchedTree(kind, path, os.path.realpath(path)) for kind, path in roots]
        self._watched: dict[int, dict[_WatchedTree, str]] = {}  # the directories of each watch
        self._above: set[int] = set()  # watches of directories above a cache
        self._pending: list[tuple[_WatchedTree, str, _Listed]] = []  # directories to list
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
            self._pending += [(tree, "", _Listed.OLD) for tree in self._trees]
            self._list_pending(math.inf)
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
        """Return what was observed until now, or until the context ended. Thread-safe and repeatable."""
        with self._lock:
            return self._last or self._observe()

    def _end(self, thread: threading.Thread, wake: int) -> None:
        try:
            with self._lock:
                self._ended = True  # from here on the thread touches no descriptor
                self._last = self._observe()
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
                self._read_events()
                self._list_pending(_TURN_SECONDS)

    def _observe(self) -> Observed:
        self._read_events()
        if self._lost:
            self._pending += [(tree, "", _Listed.COMPARE) for tree in self._trees if not tree.too_large]
        self._list_pending(_LAST_LISTING_SECONDS)
        if self._pending:  # directories are made faster than they can be listed
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
                # The events may be those of the file that replaced it.
                if count > 0 and not (self._lost and path in tree.new)
            }
            used.discard("")
            roots.append(ObservedRoot(kind=tree.kind, path=tree.path, used=frozenset(used), made=made))
        seconds = max(times) - min(times) if times else 0.0
        return Observed(roots=tuple(roots), made_seconds=seconds, complete=not self._lost)

    def _read_events(self) -> None:
        """Read the queued events, but not those that arrive meanwhile: they may never end."""
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
                self._apply(watch, mask, os.fsdecode(content[at - length : at].rstrip(b"\0")), now)

    def _apply(self, watch: int, mask: int, name: str, now: float) -> None:
        if mask & _OVERFLOW:
            self._lost = True
        elif mask & (_IGNORED | _MOVE_SELF):
            if mask & _IGNORED:
                self._watched.pop(watch, None)
            if watch in self._above:
                self._above.discard(watch)
                self._pending += [(tree, "", _Listed.NEW) for tree in self._trees]
        elif mask & _ISDIR:
            if mask & (_CREATE | _MOVED_TO):
                for tree, inside in self._watched.get(watch, {}).items():
                    self._pending.append((tree, _join(inside, name), _Listed.NEW))
                if watch in self._above:
                    below = [tree for tree in self._trees if f"/{name}/" in f"{tree.real}/"]
                    self._pending += [(tree, "", _Listed.NEW) for tree in below]
        else:
            for tree, inside in self._watched.get(watch, {}).items():
                path = _join(inside, name)
                if mask & _CREATE:
                    tree.before.pop(path, None)
                elif path in tree.before and not mask & _MOVED_TO:
                    tree.opened[path] = max(0, tree.opened.get(path, 0) + (1 if mask & _OPEN else -1))
                elif not mask & _OPEN:
                    tree.add_new(path, now)

    def _list_pending(self, seconds: float) -> None:
        """List the pending directories, for `seconds` at most: new ones may be made without end."""
        deadline = time.monotonic() + seconds
        count = 0
        while self._pending and time.monotonic() < deadline:
            tree, inside, treat_as = self._pending.pop()
            if not inside:
                self._watch_above(tree)
            if not inside or not is_left_out(tree.kind, PurePosixPath(inside)):
                self._list(tree, inside, treat_as)
            count += 1
            if count % _LISTED_AT_ONCE == 0:
                self._read_events()

    def _watch_above(self, tree: _WatchedTree) -> None:
        """Watch the closest existing directory above a cache, to notice when the cache is made."""
        while True:
            above, inner = posixpath.dirname(tree.real), tree.real
            while (watch := self._add(above, _ABOVE)) is None and above != "/":
                above, inner = posixpath.dirname(above), above
            self._above |= {watch} if watch is not None else set()
            # If `inner` exists, it was made before the watch was added: go on below it.
            if inner == tree.real or self._add(inner, _ABOVE) is None:
                return

    def _list(self, tree: _WatchedTree, inside: str, treat_as: _Listed) -> None:
        """Watch a directory and list the files that it already holds."""
        if len(tree.before) > _FILES_LIMIT:
            self._lost = tree.too_large = True
            return
        directory = f"{tree.real}/{inside}" if inside else tree.real
        watch = self._add(directory, _INSIDE)
        if watch is None:
            return
        if treat_as is _Listed.NEW and not inside:
            if self._watched.get(watch, {}).get(tree) == "":
                return  # the cache is still the same; the event was about a directory beside it
            if self._lost:  # the cache may have existed without a watch
                treat_as = _Listed.COMPARE
        if watch >= 0:
            self._watched.setdefault(watch, {})[tree] = inside
        try:
            with os.scandir(directory) as entries:
                for entry in entries:
                    path = _join(inside, entry.name)
                    if entry.is_dir(follow_symlinks=False):
                        self._pending.append((tree, path, treat_as))
                    elif entry.is_file(follow_symlinks=False):
                        self._add_file(tree, path, entry, treat_as)
        except OSError as error:
            self._note(error)

    def _add_file(self, tree: _WatchedTree, path: str, entry: os.DirEntry[str], treat_as: _Listed) -> None:
        if treat_as is _Listed.OLD:
            if path not in tree.new:
                tree.before[path] = entry.inode()
        elif treat_as is _Listed.NEW or tree.before.get(path) != entry.inode():
            with contextlib.suppress(FileNotFoundError):
                age = time.time() - entry.stat(follow_symlinks=False).st_ctime
                tree.add_new(path, max(self._started, time.monotonic() - max(0.0, age)))

    def _add(self, directory: str, mask: int) -> int | None:
        """Return the watch of a directory, -1 if it cannot be watched, None if it does not exist."""
        if self._inotify < 0:
            return -1
        try:
            return _inotify_add_watch(self._inotify, os.fsencode(directory), mask)
        except OSError as error:
            return None if self._note(error) else -1

    def _note(self, error: OSError) -> bool:
        """Return whether the error means that a directory is missing; record any other as lost events."""
        missing = error.errno in {errno.ENOENT, errno.ENOTDIR}
        self._lost |= not missing
        return missing


def _join(inside: str, name: str) -> str:
    return f"{inside}/{name}" if inside else name


def _key(tree: _WatchedTree, path: str) -> str:
    """Return the key of the entry that a file belongs to, or "" for a file that does not count."""
    where = PurePosixPath(path)
    return "" if is_left_out(tree.kind, where) else entry_key(tree.kind, where)


def _inotify_init() -> int:
    return _checked(_libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK))


def _inotify_add_watch(fd: int, directory: bytes, mask: int) -> int:
    return _checked(_libc.inotify_add_watch(fd, directory, mask))


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
