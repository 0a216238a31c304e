# SPDX-License-Identifier: Apache-2.0
"""Keep unpacked dumps, named by the digest of their manifest.

    dumps/HEX/
        criu/  memory/  shm/    the tree as CRIU reads it; running servers map what is in memory/
        copied/                 made where memory cannot be mapped: CRIU's images with all of the memory
        ready.json              written last: boot id, size, seal, whose memory files it has; its mtime is the
                                time of the last use
    dumps/HEX.part/             layers of a dump whose unpacking was given up: restore/kept_layers.py
    dumps/HEX.lock              held shared while it is restored from or mapped, exclusively to write it

An image and its deltas have the same memory files. If a dump with these is here already, `memory` is a link
to that dump's, which is locked as well while it is used.

Dumps are not synced to disk, because they are quick to unpack again. One from before the last boot may
therefore be incomplete, and is not used.
"""

import contextlib
import functools
import hashlib
import json
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

from oci.descriptor import Descriptor
from oci.image import Image
from oci.trust.verifier import Verified
from rekindle.dump_tree import tops
from rekindle.errors import BusyError, FormatError, IntegrityError, SpaceError, UsageError
from rekindle.files import disk_bytes, free_bytes, is_at, locked, remove_tree, try_lock
from rekindle.home import Home
from rekindle.os_errors import naming_full_disk
from rekindle.proc import boot_id
from rekindle.record import StoredFile, numbered
from rekindle.report import Report

_DEFAULT_LIMIT_BYTES = 64 << 30
WAIT_SECONDS = 3600.0
_ADOPT_SECONDS = 2.0
_ALONE_SECONDS = 0.2


@contextlib.contextmanager
def ready(
    home: Home,
    work: Path,
    verified: Verified[Image],
    report: Report,
    *,
    paranoid: bool = False,
    expect: Callable[[int], None] | None = None,
) -> Iterator[Path]:
    """Yield the directory of an image's dump: unpacked if missing, and not removed within the context.

    Atomic: the dump is unpacked in `work` and renamed. A kept dump is reused only if none of its files has
    changed; with `paranoid`, it is unpacked again. `expect` is told how many bytes will be read for that.

    Raises SpaceError, before removing other dumps, if the dump is larger than the whole disk.
    """
    image = verified.value
    fresh = False
    tries_left = 2
    limit = limit_bytes()
    target = place(home, image)
    lock = home.dumps / f"{image.process.digest.hex}.lock"
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        with locked(lock, shared=True, timeout=WAIT_SECONDS), _used(target) as used:
            if used and (fresh or not paranoid) and _is_ready(target, image):
                for each in used:
                    with contextlib.suppress(OSError):
                        os.utime(each / "ready.json")
                _evict(home.dumps, keep=target.name, limit=limit, room=0)
                yield target
                return
        # Between the two locks, another process may unpack the dump, or remove it to make room.
        with _alone(lock, deadline) as is_alone, naming_full_disk(home.root):
            if not is_alone:
                continue
            if (paranoid and not fresh) or not _is_ready(target, image):
                if not tries_left:
                    raise BusyError(
                        f"{target} was changed or removed right after it was unpacked",
                        hint="another restore may have removed it to make room: try again",
                    )
                tries_left -= 1
                _clear(target)
                with contextlib.nullcontext() if paranoid else _lender(home.dumps, image) as lender:
                    room = _room_bytes(image, lender)
                    _require_disk_size(home.dumps, room)
                    _evict(home.dumps, keep=target.name, limit=limit - room, room=room)
                    if expect:
                        layers = image.layers if lender is None else own_layers(image)
                        kept = set() if paranoid or lender else kept_layers(home, image)
                        expect(sum(layer.size for layer in layers if str(layer.digest) not in kept))
                    with report.phase("unpack"):
                        _unpack(image, work / "unpacked", target, report, lender, resume=not paranoid)
                fresh = True


@contextlib.contextmanager
def _alone(lock: Path, deadline: float) -> Iterator[bool]:
    """Lock a dump to unpack it; yield False if others use it: they may do so as long as their servers run."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(lock, timeout=_ALONE_SECONDS))
        except BusyError:
            if time.monotonic() > deadline:
                raise
            yield False
            return
        yield True


def place(home: Home, image: Image) -> Path:
    """Return the directory of an image's dump, whether it exists or not."""
    return home.dumps / image.process.digest.hex


def is_ready(home: Home, image: Image) -> bool:
    """Return whether an image's dump is unpacked already. Another process may remove it at any time."""
    return _is_ready(place(home, image), image)


def has_memory(home: Home, image: Image) -> bool:
    """Return whether another dump has the memory files of an image. It may be removed at any time."""
    with _lender(home.dumps, image) as lender:
        return lender is not None


def kept_layers(home: Home, image: Image) -> set[str]:
    """Return the digests of the layers that a restore which was given up has unpacked already."""
    part = _part(place(home, image))
    with contextlib.suppress(OSError, ValueError, AttributeError):
        if _is_ready(part, image):
            return set(json.loads((part / "layers.json").read_bytes()))
    return set()


def room(home: Home, image: Image) -> tuple[int, int]:
    """Return the bytes that an image's dump takes on the disk, and those that could be freed for it.

    Dumps in use count as if they could be removed.
    """
    with _lender(home.dumps, image) as lender:
        needed = _room_bytes(image, lender)
    there = free_bytes(home.dumps)
    if needed > there:
        markers = (_marker(path) for path in home.dumps.iterdir() if path.suffix != ".lock")
        there = min(there + sum(each.bytes for each in markers if each), disk_bytes(home.dumps))
    return needed, there


class KeptDump(NamedTuple):
    """A dump that is kept: its size, the Unix time of its last use, and whether a server uses it now."""

    path: Path
    bytes: int
    used: float
    in_use: bool


def listed(home: Home) -> Iterator[KeptDump]:
    """Yield the dumps that are kept, also those from before the last boot."""
    for path in home.dumps.iterdir():
        marker = _marker(path) if path.suffix != ".lock" else None
        if marker is not None:
            with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
                used = (path / "ready.json").stat().st_mtime
                yield KeptDump(path, marker.bytes, used, in_use=not _try_locked(path, stack))


def adopt(home: Home, image: Image, tree: Path) -> None:
    """Keep a dump from which an image was just packed: a restore need not unpack it. Moves `tree`."""
    target = place(home, image)
    with locked(_lock_of(target), timeout=WAIT_SECONDS):
        if not target.exists():
            size = sum(path.lstat().st_blocks * 512 for path in tree.rglob("*"))
            _mark_ready(image, tree, size)
            tree.replace(target)


@contextlib.contextmanager
def adopted(home: Home, image: Image, tree: Path) -> Iterator[None]:
    """Keep a complete dump that was filled elsewhere, unless there is one; no other removes it meanwhile.

    Moves `tree`. Does nothing if another restore unpacks the image just now.
    """
    target = place(home, image)
    lock = _lock_of(target)
    with contextlib.suppress(BusyError), locked(lock, timeout=_ADOPT_SECONDS):
        if not _is_ready(target, image):
            _clear(target)
            size = sum(path.lstat().st_blocks * 512 for path in tree.rglob("*"))
            _mark_ready(image, tree, size)
            tree.replace(target)
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(BusyError):
            stack.enter_context(locked(lock, shared=True, timeout=_ADOPT_SECONDS))
        yield


def make_room(home: Home, image: Image, keep: str) -> None:
    """Remove dumps until an image's fits. Raises SpaceError if it is larger than the disk."""
    room = _room_bytes(image, None)
    _require_disk_size(home.dumps, room)
    _evict(home.dumps, keep=keep, limit=limit_bytes() - room, room=room)


def relabel(home: Home, before: Image, after: Image) -> None:
    """Rename the dump of one image to that of another with the same files, if it still exists."""
    old, new = (home.dumps / image.process.digest.hex for image in (before, after))
    with (
        locked(_lock_of(old), timeout=WAIT_SECONDS),
        locked(_lock_of(new), timeout=WAIT_SECONDS),
    ):
        if not new.exists() and (marker := _marker(old)) and _is_ready(old, before):
            _mark_ready(after, old, marker.bytes)  # its memory may be packed in other layers
            old.rename(new)


def limit_bytes() -> int:
    """Return the bytes that kept dumps may take: $REKINDLE_DUMPS_LIMIT in GiB, 64 GiB if it is not set."""
    text = os.environ.get("REKINDLE_DUMPS_LIMIT", "")
    try:
        return int(float(text) * (1 << 30)) if text else _DEFAULT_LIMIT_BYTES
    except (ValueError, OverflowError):
        raise UsageError(f"invalid REKINDLE_DUMPS_LIMIT '{text}': not a number of GiB") from None


def _room_bytes(image: Image, lender: Path | None) -> int:
    """Return the most that a dump can take on disk.

    Bounded by what its layers can expand to: a record with false sizes would evict all other dumps.
    """
    dump = image.record.dump
    if lender is not None:
        return sum(file.size for file in own_files(image) if file.path.parts[0] == "criu")
    recorded = sum(file.size for file in dump.files if file.path.parts[0] == "criu")
    recorded += sum(each.data_bytes for each in dump.memory)
    possible = sum(image.limits.expanded_bytes(layer.size) for layer in image.layers)
    return min(recorded, possible, dump.stored_bytes or recorded)


def _require_disk_size(dumps: Path, room: int) -> None:
    """Raise SpaceError if the dump would not fit on the disk even if it were empty."""
    total = disk_bytes(dumps)
    if room > total:
        raise SpaceError(
            f"the unpacked dump needs {room:,} bytes", cause=f"the disk of {dumps} has {total:,} bytes in all"
        )


def _part(target: Path) -> Path:
    return target.with_name(f"{target.name}.part")


def _unpack(
    image: Image, staged: Path, target: Path, report: Report, lender: Path | None, *, resume: bool = True
) -> None:
    # Most restores find the dump unpacked, and zstandard takes time to load.
    from oci.dump_layers import Unpacked, unpack, workers
    from restore import kept_layers

    resume = resume and lender is None
    part = _part(target)
    unpacked = Unpacked()
    if resume and part.exists():
        unpacked = kept_layers.take(part, staged, functools.partial(_is_ready, image=image))
    while True:
        staged.mkdir(mode=0o700, exist_ok=True)
        try:
            written = unpack(
                image.blobs,
                image.layers if lender is None else own_layers(image),
                image.record.dump.files if lender is None else own_files(image),
                staged,
                workers=workers(),
                limits=image.limits,
                unpacked=unpacked,
            )
            break
        except (IntegrityError, FormatError):
            # Remove what a mirror sent before asking the registry itself.
            remove_tree(staged)
            unpacked = Unpacked()
            if not image.blobs.fall_back_to_origin():
                raise
        except BaseException:
            if resume:
                mark = functools.partial(_mark_ready, image, lends=False)
                kept_layers.keep(part, staged, unpacked, image.record.dump.files, mark)
            raise
    report.bytes.written = written
    if lender is not None:
        (staged / "memory").symlink_to(lender / "memory")
    _mark_ready(image, staged, unpacked.bytes)
    staged.replace(target)


def _mark_ready(image: Image, tree: Path, size: int, *, lends: bool = True) -> None:
    marker = {"boot": boot_id(), "bytes": size, "memory": _memory_key(image) if lends else ""}
    marker |= {"seal": _seal(tree, image), "memory_seal": _seal_memory(tree, image)}
    (tree / "ready.json").write_text(json.dumps(marker))


def own_layers(image: Image) -> list[Descriptor]:
    """Return the layers that hold no memory files."""
    return [layer for layer in image.layers if not layer.is_memory]


def own_files(image: Image) -> list[StoredFile]:
    """Return the files of a dump without its memory files, with their numbers."""
    return [
        msgspec.structs.replace(file, number=number)
        for number, file in numbered(image.record.dump.files).items()
        if file.path.parts[0] != "memory"
    ]


def _memory_key(image: Image) -> str:
    """Return a digest of what the memory files of a dump are made from; "" if it has none.

    Dumps with equal keys have equal memory files.
    """
    layers = [layer for layer in image.layers if layer.is_memory]
    if not layers:
        return ""
    files = numbered(image.record.dump.files).items()
    memory = [(number, str(file.path), file.size) for number, file in files if file.path.parts[0] == "memory"]
    facts = json.dumps([sorted(str(layer.digest) for layer in layers), sorted(memory)])
    return hashlib.sha256(facts.encode()).hexdigest()


@contextlib.contextmanager
def _lender(dumps: Path, image: Image) -> Iterator[Path | None]:
    """Yield a kept dump with the memory files of an image, or None; it is not removed within the context."""
    key = _memory_key(image)
    for path in dumps.iterdir() if key else ():
        marker = _marker(path)
        if marker is None or marker.memory != key or (path / "memory").is_symlink():
            continue
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            if not _try_locked(path, stack, shared=True):
                continue
            if marker.boot == boot_id() and marker.memory_seal == _seal_memory(path, image):
                yield path
                return
    yield None


@contextlib.contextmanager
def _used(target: Path) -> Iterator[list[Path]]:
    """Yield the directories that a kept dump consists of: itself, and the one whose memory files it links to.

    The latter is not removed within the context. Yields nothing if it is being removed already.
    """
    with contextlib.ExitStack() as stack:
        link = target / "memory"
        if not link.is_symlink():
            yield [target]
            return
        lender = link.readlink().parent
        yield [target, lender] if _try_locked(lender, stack, shared=True) else []


def _try_locked(dump: Path, stack: contextlib.ExitStack, *, shared: bool = False) -> bool:
    """Lock a dump until `stack` is closed; return False at once if another holds it, or removes it."""
    lock = _lock_of(dump)
    fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    stack.callback(os.close, fd)
    return try_lock(fd, shared=shared) and is_at(fd, lock)


def _lock_of(dump: Path) -> Path:
    return dump.with_name(f"{dump.name}.lock")


def _is_ready(target: Path, image: Image) -> bool:
    """Return whether a kept dump is complete, private, and unchanged since its digests were checked."""
    marker = _marker(target)
    if marker is None or marker.boot != boot_id():
        return False
    status = target.lstat()
    private = stat.S_ISDIR(status.st_mode) and stat.S_IMODE(status.st_mode) == 0o700
    if not private or status.st_uid != os.geteuid():
        return False
    with contextlib.suppress(OSError):
        return marker.seal == _seal(target, image)
    return False


def _seal(tree: Path, image: Image) -> str:
    """Return a digest of the metadata of every file of a dump and of their directories.

    Directories count because CRIU also reads files that the record does not list. Only root can change a
    file without changing its ctime.
    """
    files = [str(file.path) for file in image.record.dump.files]
    directories = set(tops(image.record.dump.files))
    for path in files:
        while (path := path.rpartition("/")[0]) and path not in directories:
            directories.add(path)
    return digest_of_metadata(tree, (*files, *sorted(directories, key=lambda path: path.split("/"))))


def _seal_memory(tree: Path, image: Image) -> str:
    files = [str(file.path) for file in image.record.dump.files if file.path.parts[0] == "memory"]
    return digest_of_metadata(tree, sorted(files, key=lambda path: path.split("/")))


def digest_of_metadata(tree: Path, paths: Iterable[str]) -> str:
    """Return a digest of owners, modes, sizes and times."""
    hasher = hashlib.sha256()
    for path in paths:
        status = os.lstat(f"{tree}/{path}")  # many files: three times as fast as Path.lstat
        facts = (status.st_mode, status.st_uid, status.st_gid, status.st_size, status.st_ino)
        times = (status.st_mtime_ns, status.st_ctime_ns)
        hasher.update(f"{path}\0{facts}{times}\n".encode(errors="surrogateescape"))
    return hasher.hexdigest()


class _Marker(NamedTuple):
    """The content of ready.json. `memory` is "" in those of older versions."""

    boot: str
    bytes: int
    seal: str
    memory: str
    memory_seal: str


def _marker(target: Path) -> _Marker | None:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        content = json.loads((target / "ready.json").read_bytes())
        return _Marker(
            boot=str(content["boot"]),
            bytes=int(content["bytes"]),
            seal=str(content["seal"]),
            memory=str(content.get("memory", "")),
            memory_seal=str(content.get("memory_seal", "")),
        )
    return None


def _evict(dumps: Path, *, keep: str, limit: int, room: int) -> None:
    """Remove the least recently used dumps until the rest takes `limit` bytes and `room` bytes are free.

    Dumps from before the last boot are removed in any case, dumps in use never.
    """
    found = []
    for path in dumps.iterdir():
        if path.suffix == ".lock" or path.name == keep:
            continue
        marker = _marker(path)
        stale = marker is None or marker.boot != boot_id()
        used = 0.0
        with contextlib.suppress(OSError):
            used = (path / "ready.json").stat().st_mtime
        found.append((not stale, used, path, marker.bytes if marker else 0))
    total = sum(size for _, _, _, size in found)
    for useful, _, path, size in sorted(found):
        crowded = total > limit or free_bytes(dumps) < room
        if (crowded or not useful) and remove_unused(path):
            total -= size


def remove_unused(path: Path) -> bool:
    """Remove a dump, if it is there and nothing uses it. Return whether it is gone."""
    with contextlib.ExitStack() as stack:
        if not _try_locked(path, stack):
            return False
        _clear(path)
        _lock_of(path).unlink(missing_ok=True)
        return True


def remove_superseded(path: Path) -> None:
    """Remove the dump of a replaced image, unless it is used or others may link to its memory files."""
    if (path / "memory").is_symlink():
        remove_unused(path)


def _clear(path: Path) -> None:
    """Remove a dump, or whatever else has its name. Links are not followed."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        remove_tree(path)
