# SPDX-License-Identifier: Apache-2.0
"""Dumps ready to restore, kept by the digest of their manifest.

    dumps/HEX/
        criu/  shm/             the tree, as CRIU wants it
        ready.json              when it was complete: under which boot, how large; its mtime is the last use
    dumps/HEX.lock              shared by those who restore from it, exclusive for who makes or removes it

They are not synced to disk, being quick to make again; so one that was made before the last boot is not
trusted to be whole.
"""

import contextlib
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from oci.image import Image
from oci.trust.verifier import Verified
from rekindle.errors import BusyError, FormatError, IntegrityError, SpaceError, UsageError
from rekindle.files import locked, remove_tree, try_lock
from rekindle.home import Home
from rekindle.os_errors import naming_full_disk
from rekindle.proc import boot_id
from rekindle.report import Report

_DEFAULT_LIMIT_BYTES = 64 << 30
_WAIT_SECONDS = 3600.0


@contextlib.contextmanager
def ready(
    home: Home, work: Path, verified: Verified[Image], report: Report, *, paranoid: bool = False
) -> Iterator[Path]:
    """The directory of an image's dump, unpacked if it is not there yet, and kept while in use.

    Readers never see half a dump: it is unpacked in `work` and renamed. One that was kept is taken only if
    nothing about its files has changed since; with `paranoid`, it is never taken.

    Raises SpaceError, and removes none, if the disk has not enough room even without the others.
    """
    image = verified.value
    fresh = False
    tries_left = 2
    limit = limit_bytes()
    target = home.dumps / image.process.digest.hex
    lock = home.dumps / f"{image.process.digest.hex}.lock"
    while True:
        with locked(lock, shared=True, timeout=_WAIT_SECONDS):
            if (fresh or not paranoid) and _is_ready(target, image):
                with contextlib.suppress(OSError):
                    os.utime(target / "ready.json")
                _evict(home.dumps, keep=target.name, limit=limit, room=0)
                yield target
                return
        # Between the two locks, another may unpack it for us, or make room by removing it again.
        with locked(lock, timeout=_WAIT_SECONDS), naming_full_disk(home.root):
            if (paranoid and not fresh) or not _is_ready(target, image):
                if not tries_left:
                    raise BusyError(
                        f"{target} does not stay as it was unpacked",
                        hint="another restore removes it to make room, or something changes it: try again",
                    )
                tries_left -= 1
                _clear(target)
                room = _room_bytes(image)
                _refuse_what_never_fits(home.dumps, room)
                _evict(home.dumps, keep=target.name, limit=limit - room, room=room)
                with report.phase("unpack"):
                    _unpack(image, work / "unpacked", target, report)
                fresh = True


def is_ready(home: Home, image: Image) -> bool:
    """Whether a dump is there already. It may be gone again when it is wanted."""
    return _is_ready(home.dumps / image.process.digest.hex, image)


def limit_bytes() -> int:
    """How much the kept dumps may take: $REKINDLE_DUMPS_LIMIT in GiB, 64 if it is not set."""
    text = os.environ.get("REKINDLE_DUMPS_LIMIT", "")
    try:
        return int(float(text) * (1 << 30)) if text else _DEFAULT_LIMIT_BYTES
    except (ValueError, OverflowError):
        raise UsageError(f"REKINDLE_DUMPS_LIMIT={text} is no number of GiB") from None


def _room_bytes(image: Image) -> int:
    """How much a dump takes at most. What the record says of files, its layers must be able to hold: a lie
    would cost all the other dumps."""
    said = sum(file.size for file in image.record.files if file.path.parts[0] == "criu")
    possible = sum(image.limits.expanded_bytes(layer.size) for layer in image.layers)
    return min(said, possible, image.record.stored_bytes or said)


def _refuse_what_never_fits(dumps: Path, room: int) -> None:
    total = shutil.disk_usage(dumps).total
    if room > total:
        raise SpaceError(
            f"the dump takes {room:,} bytes unpacked", cause=f"the disk of {dumps} has {total:,} in all"
        )


def _unpack(image: Image, staged: Path, target: Path, report: Report) -> None:
    from oci.layers import (  # most restores find the dump unpacked, and zstandard takes time to load
        unpack,
        workers,
    )

    while True:
        staged.mkdir(mode=0o700)
        try:
            written = unpack(
                image.blobs,
                image.layers,
                image.record.files,
                staged,
                workers=workers(),
                limits=image.limits,
            )
            break
        except (IntegrityError, FormatError):
            # What a mirror gave is gone before the registry itself is asked.
            remove_tree(staged)
            if not image.blobs.fall_back_to_origin():
                raise
    report.bytes.written = written
    (staged / "ready.json").write_text(
        json.dumps({"boot": boot_id(), "bytes": written, "seal": _seal(staged, image)})
    )
    staged.replace(target)


def _is_ready(target: Path, image: Image) -> bool:
    """Whether a kept dump is whole, ours alone, and as it was when its digests matched."""
    marker = _marker(target)
    if marker is None or marker[0] != boot_id():
        return False
    status = target.lstat()
    private = stat.S_ISDIR(status.st_mode) and stat.S_IMODE(status.st_mode) == 0o700
    if not private or status.st_uid != os.geteuid():
        return False
    with contextlib.suppress(OSError):
        return marker[2] == _seal(target, image)
    return False


def _seal(tree: Path, image: Image) -> str:
    """A digest over what the file system says of every file of a dump, and of the directories that they lie
    in: CRIU also reads what merely lies there. Nobody who is not root can write to one and leave its time of
    change as it was."""
    files = [file.path for file in image.record.files]
    directories = {PurePosixPath("criu"), PurePosixPath("shm")}
    directories |= {parent for path in files for parent in path.parents if parent.parts}
    hasher = hashlib.sha256()
    for path in (*files, *sorted(directories)):
        status = (tree / path).lstat()
        facts = (status.st_mode, status.st_uid, status.st_gid, status.st_size, status.st_ino)
        times = (status.st_mtime_ns, status.st_ctime_ns)
        hasher.update(f"{path}\0{facts}{times}\n".encode(errors="surrogateescape"))
    return hasher.hexdigest()


def _marker(target: Path) -> tuple[str, int, str] | None:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        content = json.loads((target / "ready.json").read_bytes())
        return str(content["boot"]), int(content["bytes"]), str(content["seal"])
    return None


def _evict(dumps: Path, *, keep: str, limit: int, room: int) -> None:
    """Removes the dumps that were not used for longest until the rest fits into `limit` bytes, and `room`
    bytes are free on the disk; those of another boot at once; none that is in use."""
    found = []
    for path in dumps.iterdir():
        if path.suffix == ".lock" or path.name == keep:
            continue
        marker = _marker(path)
        stale = marker is None or marker[0] != boot_id()
        used = 0.0
        with contextlib.suppress(OSError):
            used = (path / "ready.json").stat().st_mtime
        found.append((not stale, used, path, marker[1] if marker else 0))
    total = sum(size for _, _, _, size in found)
    for useful, _, path, size in sorted(found):
        crowded = total > limit or shutil.disk_usage(dumps).free < room
        if (crowded or not useful) and _remove(path):
            total -= size


def _remove(path: Path) -> bool:
    fd = os.open(path.with_name(f"{path.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        if not try_lock(fd):
            return False
        _clear(path)
        return True
    finally:
        os.close(fd)


def _clear(path: Path) -> None:
    """Removes a dump, or whatever else lies in its place. Where a link leads, nothing is removed."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        remove_tree(path)
