# SPDX-License-Identifier: Apache-2.0
"""Find the files outside the cell that a server shares with the world, and decide which are copied.

A file that is open or mapped for writing, or locked for one alone, would be shared by all replicas. Each gets
a copy of its own if the server made it itself since its start, if it is empty, or if it is in a runtime
directory, and if it is small. A directory that the server made is copied with its content, unless that is
large. Everything else is refused.
"""

import contextlib
import ctypes
import itertools
import os
import posixpath
import re
import stat
import struct
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

from msgspec import Struct, structs

from rekindle.cell import Cell, private, processes
from rekindle.record import NeededDirectory
from rekindle.text import listed

FILE_LIMIT_BYTES = 64 << 20
"""The largest file that is copied, and the largest content of a directory, in bytes on the disk."""

_ENTRIES_LIMIT = 1000  # of a directory
_INSIDE = ("/dev/", "/proc/", "/memfd:", "/SYSV")
_O_PATH = 0o10000000
_SLACK_NS = 10_000_000  # a file's time is that of the OS kernel's last tick
_STATX_BTIME = 0x800
_RUNTIME_VARIABLES = ("XDG_RUNTIME_DIR", "RUNTIME_DIRECTORY")
_HSPERFDATA = re.compile(r"/tmp/hsperfdata_[^/]+/[0-9]+")  # noqa: S108 - where every JVM has its counters
_SQLITE = b"SQLite format 3\0"
DATABASE = (
    # Its writers fail with SQLITE_READONLY_DBMOVED, or take their own locks for those of others.
    "is a database of SQLite, which knows its file by the inode, and a restored server has another",
    "close it before the snapshot, as by opening it only when it is used",
)
_REMEDY = "log to stdout or stderr, and keep other files below $TMPDIR"

_libc = ctypes.CDLL(None, use_errno=True)


class PrivatePaths(Struct, frozen=True, kw_only=True):
    """The paths of which each replica gets a copy, the directories that a restore needs, and what is refused.

    `made` are files that the server made and only reads, for places where they are missing. `written` are
    those that it writes to. `refused` gives for a path what is wrong and the remedy.
    """

    copied: tuple[str, ...] = ()
    written: tuple[str, ...] = ()
    made: tuple[str, ...] = ()
    directories: tuple[NeededDirectory, ...] = ()
    refused: Mapping[str, tuple[str, str]] = {}

    def holds(self, path: str) -> bool:
        """Return whether a path is one of those that are copied, or below one."""
        return any(path == each or path.startswith(f"{each}/") for each in self.copied)


class _Used(Struct):
    """The use of a path: `how` says in words why replicas would share it; "" if they would not."""

    status: os.stat_result
    how: str = ""
    direct: bool = False


def tell(private: PrivatePaths, say: Callable[[str], None]) -> None:
    """Say which paths each replica gets a copy of."""
    if private.copied:
        say(
            "each replica gets a copy of its own, in memory, of what the server writes to: "
            f"{listed(private.copied)}"
        )


def keep(cell: Cell, found: PrivatePaths, target: Path) -> PrivatePaths:
    """Copy what is private into a directory of the dump; return it without what is gone by now."""
    directories = [each.path for each in found.directories]
    kept = private.keep(cell, (*found.copied, *found.made), directories, target)
    made = tuple(path for path in kept if path in found.made)
    return structs.replace(found, copied=tuple(path for path in kept if path not in made), made=made)


def find(
    cell: Cell,
    pids: Sequence[int],
    *,
    since_ns: int,
    environment: Mapping[str, str],
    own: Collection[str] = (),
    opened: Collection[str] = (),
    left_out: Sequence[str] = (),
) -> PrivatePaths:
    """Sort what the processes use outside the cell.

    They began after `since_ns`; `own` are their logs. `opened` are all files that they have open or mapped;
    those that they made count, unless they lie in directories that are `left_out`.
    """
    used, deleted, databases = _used(cell, pids, own)
    made = _Made(cell, since_ns - _SLACK_NS, environment)
    working = {path for path, each in used.items() if stat.S_ISDIR(each.status.st_mode)}
    shared = {path: each for path, each in used.items() if each.how}
    parents = {posixpath.dirname(path) for path in {*shared, *_bound(cell, pids)}}
    candidates = working | parents | deleted
    whole = _outermost(path for path in candidates if made.directory(path) and _is_small(cell, path, made))
    refused = dict.fromkeys(databases, DATABASE)
    files = []
    for path, each in shared.items():
        if PrivatePaths(copied=tuple(whole)).holds(path):
            continue
        if problem := _problem(path, each, made):
            refused[path] = problem
        else:
            files.append(path)
    copied = tuple(sorted([*whole, *files]))
    read = _read(cell, opened, [*copied, *refused, *left_out, *own], made)
    return PrivatePaths(
        copied=copied,
        written=tuple(shared),
        made=read,
        directories=tuple(_needed([*copied, *read], working, deleted, made)),
        refused=refused,
    )


def _read(cell: Cell, opened: Collection[str], left_out: Sequence[str], made: "_Made") -> tuple[str, ...]:
    """Return the files that the server made and only reads, as far as they are not too many or too large."""
    found: list[str] = []
    size = 0
    beside = PrivatePaths(copied=tuple(left_out))
    for path in sorted(opened):
        if not path.startswith("/") or path.startswith((*_INSIDE, "/sys/")) or beside.holds(path):
            continue
        with contextlib.suppress(OSError):
            status = (cell.root / path.lstrip("/")).lstat()
            if not stat.S_ISREG(status.st_mode) or not made.born(path):
                continue
            size += status.st_blocks * 512
            if size > FILE_LIMIT_BYTES or len(found) == _ENTRIES_LIMIT:
                break
            found.append(path)
    return tuple(found)


def _used(
    cell: Cell, pids: Sequence[int], own: Collection[str]
) -> tuple[dict[str, _Used], set[str], set[str]]:
    """Return the files, pipes and directories that processes use outside the cell.

    Also return the directories of deleted files, and the databases of SQLite that are written to anywhere.
    """
    used: dict[str, _Used] = {}
    deleted: set[str] = set()
    databases: set[str] = set()
    for pid in pids:
        process = processes.proc(cell) / str(pid)
        with contextlib.suppress(OSError):
            _add(used, deleted, str((process / "cwd").readlink()), (process / "cwd").stat())
        for fd, target in processes.descriptors(cell, pid):
            if target.startswith("/") and target not in own:
                with contextlib.suppress(OSError):
                    status = (process / "fd" / str(fd)).stat()
                    info = (process / "fdinfo" / str(fd)).read_text()
                    how = _how(status, info)
                    _add(used, deleted, target, status, how, direct=bool(_flags(info) & os.O_DIRECT))
                    if how and stat.S_ISREG(status.st_mode) and _is_sqlite(process / "fd" / str(fd)):
                        databases.add(target)
        for path in processes.written_mappings(cell, pid):
            with contextlib.suppress(OSError):
                gone = path.endswith(" (deleted)")
                status = (cell.root / (posixpath.dirname(path) if gone else path).lstrip("/")).stat()
                _add(used, deleted, path, status, "is mapped for writing")
    return used, deleted, databases


def _add(
    used: dict[str, _Used],
    deleted: set[str],
    path: str,
    status: os.stat_result,
    how: str = "",
    *,
    direct: bool = False,
) -> None:
    if not path.startswith("/") or f"{path}/".startswith(_INSIDE):
        return
    if path.startswith("/sys/") and not (how and status.st_size):  # those of cgroups have no size
        return
    if path.endswith(" (deleted)"):
        deleted.add(posixpath.dirname(path))
        return
    known = used.setdefault(path, _Used(status))
    known.how, known.direct = known.how or how, known.direct or direct


def _how(status: os.stat_result, info: str) -> str:
    """Say why replicas would share an open file, from its /proc/PID/fdinfo (proc_pid_fdinfo(5))."""
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISFIFO(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        return ""
    flags = _flags(info)
    if flags & os.O_ACCMODE != os.O_RDONLY and not flags & _O_PATH:
        return "is open for writing"
    # "lock:	1: FLOCK  ADVISORY  WRITE 1002 08:01:1234 0 EOF"
    for line in info.splitlines():
        if line.startswith("lock:") and " WRITE " in line:
            return "is locked for this process alone"
    return ""


def _flags(info: str) -> int:
    fields = info.split()
    return int(fields[fields.index("flags:") + 1], 8)


def _bound(cell: Cell, pids: Sequence[int]) -> set[str]:
    """Return the paths of unix sockets outside the cell, relative ones as seen from each process."""
    found: set[str] = set()
    inodes = {str(each) for each in processes.socket_inodes(cell, pids)}
    with contextlib.suppress(OSError):
        for line in (processes.proc(cell) / str(pids[0]) / "net/unix").read_text().splitlines()[1:]:
            fields = line.split(maxsplit=7)
            if len(fields) > 7 and fields[6] in inodes and not fields[7].startswith("@"):
                found |= set(socket_paths(cell, fields[7], pids))
    return {path for path in found if not path.startswith(_INSIDE)}


def socket_paths(cell: Cell, name: str, pids: Sequence[int]) -> Iterator[str]:
    """Yield where a unix socket's name may lead: a relative one starts at a process's directory."""
    if name.startswith("/"):
        yield name
        return
    for pid in pids:
        with contextlib.suppress(OSError):
            path = posixpath.normpath(f"{(processes.proc(cell) / str(pid) / 'cwd').readlink()}/{name}")
            if stat.S_ISSOCK((cell.root / path.lstrip("/")).lstat().st_mode):
                yield path


class _Made:
    """Tells what a server made itself: by the time of birth, or by its place in a runtime directory."""

    def __init__(self, cell: Cell, since_ns: int, environment: Mapping[str, str]) -> None:
        self._cell, self._since_ns = cell, since_ns
        named = [path for name in _RUNTIME_VARIABLES for path in environment.get(name, "").split(":")]
        self._runtime = tuple(f"{path.rstrip('/')}/" for path in named if path.strip("/"))
        self._temporary = _own_temporary(environment) if cell.only is not None else None

    def directory(self, path: str) -> bool:
        """Return whether the server made a directory.

        On overlayfs, a directory is born again when something is first made in it, and a file when it is
        first written to. So nothing in it may be older.
        """
        if self._temporary is not None and f"{path}/".startswith(self._temporary):
            return True
        if path == "/" or not self.born(path):
            return False
        with contextlib.suppress(OSError), os.scandir(self._cell.root / path.lstrip("/")) as entries:
            first = itertools.islice(entries, _ENTRIES_LIMIT)
            return all(_birth_ns(Path(each.path)) >= self._since_ns for each in first)
        return False

    def file(self, path: str) -> bool:
        if self._temporary is not None and path.startswith(self._temporary):
            return True
        return path.startswith(self._runtime) or bool(_HSPERFDATA.fullmatch(path)) or self.born(path)

    def born(self, path: str) -> bool:
        return _birth_ns(self._cell.root / path.lstrip("/")) >= self._since_ns

    def place(self, path: str) -> bool:
        """Return whether a restore may make a directory: one of the server, or a runtime directory."""
        runtime = f"{path}/".startswith(self._runtime) or _HSPERFDATA.fullmatch(f"{path}/1")
        return bool(runtime) or self.directory(path)


def _own_temporary(environment: Mapping[str, str]) -> str | None:
    """Return the $TMPDIR of a server that is not in a cell, unless it is for all users, as /tmp is."""
    path = environment.get("TMPDIR", "").rstrip("/")
    with contextlib.suppress(OSError):
        if path and not Path(path).stat().st_mode & stat.S_ISVTX:
            return f"{path}/"
    return None


def _birth_ns(path: Path) -> int:
    """Return when a file was made (statx(2), stx_btime); 0 if its file system does not tell."""
    buffer = ctypes.create_string_buffer(256)
    at_fdcwd, nofollow = -100, 0x100
    if _libc.statx(at_fdcwd, os.fsencode(path), nofollow, _STATX_BTIME, buffer):
        return 0
    (mask,) = struct.unpack_from("=I", buffer)
    seconds, nanoseconds = struct.unpack_from("=qI", buffer, 80)
    return int(seconds * 10**9 + nanoseconds) if mask & _STATX_BTIME else 0


def _is_small(cell: Cell, path: str, made: _Made) -> bool:
    """Return whether a directory with its content can be copied, and is all of the server's."""
    root = cell.root / path.lstrip("/")
    size = count = 0
    device = root.stat().st_dev
    for place, directories, names in os.walk(root):
        if not made.directory(f"{path}{place[len(str(root)) :]}"):
            return False
        for name in (*directories, *names):
            try:
                status = Path(place, name).lstat()
            except OSError:
                continue
            size += status.st_blocks * 512
            count += 1
            special = stat.S_ISBLK(status.st_mode) or stat.S_ISCHR(status.st_mode)
            if special or status.st_dev != device or size > FILE_LIMIT_BYTES or count > _ENTRIES_LIMIT:
                return False
    return True


def _problem(path: str, used: _Used, made: _Made) -> tuple[str, str] | None:
    """Return what keeps a shared file from being copied, and the remedy; None if nothing does."""
    status = used.status
    if stat.S_ISDIR(status.st_mode):
        return used.how, "lock a file that the server makes, or one below $TMPDIR"
    if status.st_blocks * 512 > FILE_LIMIT_BYTES:
        many = f"has {status.st_blocks * 512:,} bytes on the disk, more than are copied for a replica"
        return f"{used.how}, and {many}", _REMEDY
    if used.direct:
        return f"{used.how} past the page cache (O_DIRECT)", "turn that off"
    if (status.st_size or stat.S_ISFIFO(status.st_mode)) and not made.file(path):
        return f"{used.how}, and was there before the server, or it is unknown since when", _REMEDY
    return None


def _is_sqlite(path: Path) -> bool:
    with contextlib.suppress(OSError), open(path, "rb") as file:
        return file.read(len(_SQLITE)) == _SQLITE
    return False


def _outermost(paths: Iterator[str]) -> list[str]:
    found: list[str] = []
    for path in sorted(paths):
        if not any(path.startswith(f"{each}/") for each in found):
            found.append(path)
    return found


def _needed(
    copied: Sequence[str], working: set[str], deleted: set[str], made: _Made
) -> Iterator[NeededDirectory]:
    """Yield the directories that must be there, those above others first."""
    below = PrivatePaths(copied=tuple(copied))
    wanted = {path for path in working | deleted if not below.holds(path)}
    for path in {*wanted, *(posixpath.dirname(each) for each in copied)}:
        while path != "/":
            wanted.add(path)
            if not made.place(path):
                break
            path = posixpath.dirname(path)
    for path in sorted(wanted - {"/"}):
        written = path in deleted
        own = made.place(path)
        if written or own or path in working or any(posixpath.dirname(each) == path for each in copied):
            yield NeededDirectory(path=path, made=own, written=written)
