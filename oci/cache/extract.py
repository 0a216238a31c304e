# SPDX-License-Identifier: Apache-2.0
"""Extracts a kernel cache: verified before anything of it can be seen, and nowhere but where it may be.

Each cache is written into a private directory beside the place that it goes to, `.NAME.rekindle-XXXX`. Only
when every layer's bytes have matched their digests, those directories are renamed, or merged with what is
there already. Whatever ends the command, they are gone; of one that is killed, the next removes them.
"""

import contextlib
import json
import os
import posixpath
import stat
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from oci.cache.image import CacheImage
from oci.cache.inventory import METADATA_LIMIT_BYTES, StoredRoot, entry_key
from oci.cache.names import Names
from oci.cache.tar_reader import LayerReader, Member
from oci.trust.verifier import Verified
from rekindle.config import Limits
from rekindle.engine.caches import CacheKind, environment_for, is_within, place_below
from rekindle.errors import FormatError, IntegrityError, NotFoundError, UsageError
from rekindle.files import remove_tree, try_lock
from rekindle.os_errors import naming_full_disk

_FILES_LIMIT = 1_000_000  # of one cache, with its directories
_MANIFEST_LIMIT_BYTES = 256 << 20  # MCV's, which is read but not kept
_STAGED = ".rekindle-"
_COMPARED_BYTES = 1 << 20
_ALONE_SECONDS = 60.0
_WITH_GROUPS = {CacheKind.TRITON, CacheKind.INDUCTOR, CacheKind.VLLM}
_FULL_HINT = "free some, or extract to another disk"

# Nobody's kernel cache lies there, and a file that appears there may be run or read by others.
_SYSTEM = ("/bin", "/boot", "/dev", "/etc", "/lib", "/lib32", "/lib64", "/proc", "/sbin", "/sys", "/usr")
_SYSTEM_ALLOWED = ("/dev/shm", "/usr/local/share", "/usr/share")  # noqa: S108
_PRIVATE = {".ssh", ".gnupg", ".config", ".aws", ".kube", ".docker", ".local"}
# Of what programs keep for a user, a cache may lie beside the rest, where nothing is started from by itself.
_DATA = (".local", "share")
_STARTED = {"applications", "systemd", "dbus-1", "autostart", "keyrings", "bash-completion", "fish", "zsh"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtractedRoot:
    """Where a cache is now. `kept` are the entries that were there with other content, and stayed so;
    `written` the paths below `path` of the files that were not there before."""

    kind: CacheKind
    path: Path
    files: int
    bytes: int
    kept: Sequence[str]
    written: Sequence[PurePosixPath] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Extraction:
    """What was written, and the variables that make a server use it."""

    roots: Sequence[ExtractedRoot]
    environment: Mapping[str, str]

    @property
    def written_bytes(self) -> int:
        return sum(root.bytes for root in self.roots)

    def undo(self) -> None:
        """Removes what was written, and the directories that are empty then. What others have put there since
        stays."""
        for root in self.roots:
            real = Path(os.path.realpath(root.path))
            directories: set[PurePosixPath] = set()
            for path in root.written:
                with contextlib.suppress(OSError):
                    (real / path).unlink()
                directories |= set(path.parents)
            for directory in sorted(directories, key=lambda path: len(path.parts), reverse=True):
                _remove_if_empty(real / directory)


@dataclass(slots=True, kw_only=True)
class _Job:
    """A cache on its way."""

    root: StoredRoot
    target: Path
    staging: Path
    directories: list[tuple[PurePosixPath, int, int]] = field(default_factory=list)
    groups: list[PurePosixPath] = field(default_factory=list)
    paths: list[PurePosixPath] = field(default_factory=list)


def extract(
    verified: Verified[CacheImage],
    to: Path | Mapping[str, Path] | None,
    *,
    limits: Limits,
    kinds: Collection[CacheKind] | None = None,
    overwrite: bool = False,
    workers: int = 0,
) -> Extraction:
    """Writes the caches of an image, to `to/KIND/…` or, if that is None, to where each was recorded. A
    mapping names by their roots' names the caches to write, and the place of each.

    A cache that is there already is added to, entry by entry; one of its entries that is there with other
    content stays as it is, unless `overwrite`. Modes and times are as they were packed, but nobody else may
    write; directories without files are not made. Idempotent.

    Raises IntegrityError for bytes that are not those of their digests, FormatError for a layer that lies,
    NotFoundError if there is nothing of the kinds, UsageError for a place that cannot be, SpaceError.
    """
    image = verified.value
    roots = [
        root
        for root in image.inventory.roots
        if (kinds is None or root.kind in kinds) and (not isinstance(to, Mapping) or root.name in to)
    ]
    if not roots:
        raise NotFoundError(f"{image.manifest.digest} holds no kernel cache of that kind")
    targets = [_target(root, to) for root in roots]
    real = [os.path.realpath(target) for target in targets]
    nested = any(one != other and is_within(one, other) for one in real for other in real)
    if nested or len(set(real)) != len(real):
        raise UsageError(
            "two kernel caches of the image would be written into each other",
            cause=", ".join(sorted(map(str, targets))),
            hint="extract them to a directory: --to DIR",
        )
    for root in roots:
        _refuse_what_is_too_much(root, image.layers[root.layer].size, limits)
    while True:
        with contextlib.ExitStack() as stack, naming_full_disk(targets[0], hint=_FULL_HINT):
            jobs = [
                _Job(root=root, target=target, staging=stack.enter_context(_staging(target)))
                for root, target in zip(roots, targets, strict=True)
            ]
            try:
                _read_all(image, jobs, limits, workers or len(os.sched_getaffinity(0)))
            except IntegrityError:
                if not image.blobs.distrust():
                    raise
                continue
            for job in jobs:
                _finish(job)
            extracted: list[ExtractedRoot] = []
            try:
                for job in jobs:
                    extracted.append(_publish(job, overwrite=overwrite))
            except BaseException:
                Extraction(roots=extracted, environment={}).undo()
                raise
            break
    environment: dict[str, str] = {}
    for each in extracted:
        environment = environment_for(each.kind, str(each.path)) | environment
    return Extraction(roots=extracted, environment=dict(sorted(environment.items())))


def _target(root: StoredRoot, to: Path | Mapping[str, Path] | None) -> Path:
    if isinstance(to, Mapping) and str(to[root.name]) != root.recorded:
        return to[root.name]
    if isinstance(to, Path):
        return place_below(root.kind, Path(posixpath.normpath(to.absolute())) / root.name)
    real = os.path.realpath(root.recorded)
    if (
        any(is_within(path, directory) for path in (root.recorded, real) for directory in _SYSTEM)
        and not any(is_within(real, directory) for directory in _SYSTEM_ALLOWED)
    ) or any(_is_private(PurePosixPath(path)) for path in (root.recorded, real)):
        raise UsageError(
            f"the {root.kind} cache was recorded at {root.recorded}, where no cache belongs",
            hint="extract it to a directory: --to DIR",
        )
    return Path(root.recorded)


def _is_private(path: PurePosixPath) -> bool:
    parts = list(path.parts)
    if ".local" in parts:
        at = parts.index(".local")
        below = parts[at + 2 :]
        if tuple(parts[at : at + 2]) == _DATA and below and below[0] not in _STARTED:
            del parts[at : at + 2]
    return bool(_PRIVATE & set(parts))


def _refuse_what_is_too_much(root: StoredRoot, stored_bytes: int, limits: Limits) -> None:
    if root.files > _FILES_LIMIT or root.bytes > limits.expanded_bytes(stored_bytes):
        raise FormatError(
            f"the {root.kind} cache becomes larger than is sane",
            cause=f"{root.files:,} files of {root.bytes:,} bytes, from {stored_bytes:,} bytes",
            hint="if that is as it should be, raise limits.expansion_ratio in the configuration",
        )


@contextlib.contextmanager
def _staging(target: Path) -> Iterator[Path]:
    """A private directory beside a place, locked while it is in use; gone at the end.

    Within the place if that is a volume of its own, as in containers, or what is beside it cannot be
    written: files can be moved on one file system only.
    """
    real = Path(os.path.realpath(target))
    within = os.path.ismount(real) or (real.is_dir() and not os.access(real.parent, os.W_OK))
    parent = real if within else real.parent
    with contextlib.ExitStack() as stack:
        for directory in reversed([parent, *parent.parents]):
            try:
                directory.mkdir()
            except FileExistsError:
                continue
            except OSError as error:
                if directory.is_dir():  # a file system that may not be written to, further up
                    continue
                raise _cannot_be_written(target, error) from None
            stack.callback(_remove_if_empty, directory)
        staging = parent / f".{target.name}{_STAGED}{os.urandom(6).hex()}"
        # Held until ours is locked, lest another extraction take it for one that was left behind.
        with _alone_in(parent) as alone:
            if alone:
                _sweep(parent, target.name)
            try:
                staging.mkdir(mode=0o700)
            except OSError as error:
                raise _cannot_be_written(target, error) from None
            stack.callback(remove_tree, staging)
            fd = os.open(staging, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, fd)
            try_lock(fd)
        yield staging


@contextlib.contextmanager
def _alone_in(parent: Path) -> Iterator[bool]:
    """Keeps other extractions from making or sweeping staging directories there; whether it could."""
    fd = -1
    alone = False
    with contextlib.suppress(OSError):  # it is a file, or its file system has no such locks
        fd = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        alone = try_lock(fd, timeout=_ALONE_SECONDS)
    try:
        yield alone
    finally:
        if fd >= 0:
            os.close(fd)


def _cannot_be_written(target: Path, error: OSError) -> UsageError | OSError:
    import errno

    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return error
    return UsageError(f"{target} cannot be written", cause=str(error), hint="--to DIR chooses another place")


def _remove_if_empty(directory: Path) -> None:
    with contextlib.suppress(OSError):
        directory.rmdir()


def _sweep(parent: Path, name: str) -> None:
    """Removes what killed extractions left beside a place."""
    prefix = f".{name}{_STAGED}"
    left: list[Path] = []
    with contextlib.suppress(OSError), os.scandir(parent) as entries:
        left = [Path(entry.path) for entry in entries if entry.name.startswith(prefix)]
    for path in left:
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                if try_lock(fd):
                    remove_tree(path)
            finally:
                os.close(fd)


def _read_all(image: CacheImage, jobs: Sequence[_Job], limits: Limits, workers: int) -> None:
    from concurrent.futures import ThreadPoolExecutor

    stop = threading.Event()
    with ThreadPoolExecutor(min(workers, len(jobs))) as pool:
        running = [pool.submit(_read_layer, image, job, limits, stop) for job in jobs]
        try:
            for each in running:
                each.result()
        except BaseException:
            stop.set()
            image.blobs.cancel()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _read_layer(image: CacheImage, job: _Job, limits: Limits, stop: threading.Event) -> None:
    """Writes the files of a layer into the staging directory; all of its bytes are checked then."""
    from concurrent.futures import ThreadPoolExecutor

    layer = image.layers[job.root.layer]
    limit_bytes = limits.expanded_bytes(layer.size)
    with (
        ThreadPoolExecutor(1) as ahead,
        contextlib.closing(LayerReader(image.blobs, layer, limit_bytes=limit_bytes, pool=ahead)) as reader,
    ):
        try:
            _write_members(reader, job, stop)
            if not stop.is_set():
                reader.finish(image.diff_ids[job.root.layer])
        except FormatError as error:
            raise reader.verdict(error) from error


def _write_members(reader: LayerReader, job: _Job, stop: threading.Event) -> None:
    prefix = PurePosixPath(job.root.prefix)
    aside = PurePosixPath(prefix.parts[0].removesuffix(".cache") + ".manifest")
    names, known, seen_aside = Names(), {PurePosixPath()}, set[PurePosixPath]()
    empty: dict[PurePosixPath, tuple[int, int]] = {}  # made when a file needs them: they cost next to nothing
    files = size = 0
    with _Tree(job.staging) as tree:
        for member in reader.members():
            if stop.is_set():
                return
            path = PurePosixPath(member.name)
            if str(path) != member.name or path.is_absolute() or not path.parts or ".." in path.parts:
                raise FormatError("the layer has a name that is none", cause=f"{member.name!r:.120}")
            if not path.is_relative_to(prefix) or path == prefix:
                _skip(reader, member, path, prefix, aside, seen_aside)
                continue
            path = path.relative_to(prefix)
            if reason := names.refuses(path):
                raise FormatError(f"the layer has a file that {reason}", cause=f"{member.name!r:.120}")
            if path.parent not in known:
                raise FormatError("the layer has a file before its directory", cause=f"{member.name!r:.120}")
            if member.is_directory:
                known.add(path)
                empty[path] = (member.mode, member.mtime_ns)
            else:
                files, size = files + 1, size + member.size
                if files > job.root.files or size > job.root.bytes:
                    raise FormatError("the layer holds more than the inventory says")
                for directory in reversed(path.parents):
                    if directory in empty:
                        tree.make_directory(directory)
                        job.directories.append((directory, *empty.pop(directory)))
                tree.write_file(path, member, reader)
                job.paths.append(path)
                if path.name.startswith("__grp__") and member.size <= METADATA_LIMIT_BYTES:
                    job.groups.append(path)
            if len(known) > _FILES_LIMIT:
                raise FormatError("the layer has more directories than is sane")
    if (files, size) != (job.root.files, job.root.bytes):
        raise FormatError("the layer holds less than the inventory says")


def _skip(
    reader: LayerReader,
    member: Member,
    path: PurePosixPath,
    prefix: PurePosixPath,
    aside: PurePosixPath,
    seen: set[PurePosixPath],
) -> None:
    """The directories above the cache, and MCV's manifest: nothing else may be beside it."""
    expected = {*prefix.parents[:-1], prefix, aside} if member.is_directory else {aside / "manifest.json"}
    if path not in expected or path in seen or member.size > _MANIFEST_LIMIT_BYTES:
        raise FormatError("the layer has a file outside its cache", cause=f"{member.name!r:.120}")
    seen.add(path)
    if not member.is_directory:
        for _ in reader.content(member.size):
            pass


class _Tree:
    """A directory that is written below, through descriptors, so that no link is ever followed."""

    def __init__(self, root: Path) -> None:
        self._root = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        self._here, self._at = self._root, PurePosixPath()

    def __enter__(self) -> "_Tree":
        return self

    def __exit__(self, *_: object) -> None:
        self._leave()
        os.close(self._root)

    def make_directory(self, path: PurePosixPath) -> None:
        os.mkdir(path.name, 0o700, dir_fd=self._enter(path.parent))

    def write_file(self, path: PurePosixPath, member: Member, reader: LayerReader) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(path.name, flags, 0o600, dir_fd=self._enter(path.parent))
        try:
            for piece in reader.content(member.size):
                view = piece
                while view:
                    view = view[os.write(fd, view) :]
            os.fchmod(fd, member.mode)
            os.utime(fd, ns=(member.mtime_ns, member.mtime_ns))
        finally:
            os.close(fd)

    def _enter(self, path: PurePosixPath) -> int:
        """A descriptor of a directory; files come directory by directory, so one is kept."""
        if path != self._at:
            self._leave()
            self._here = _open_below(self._root, path)
            self._at = path
        return self._here

    def _leave(self) -> None:
        if self._here != self._root:
            os.close(self._here)
        self._here, self._at = self._root, PurePosixPath()


def _open_below(root: int, path: PurePosixPath) -> int:
    """Opens a directory without following a link. Raises OSError."""
    fd = os.dup(root)
    for part in path.parts:
        try:
            inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
        finally:
            os.close(fd)
        fd = inner
    return fd


def _finish(job: _Job) -> None:
    """Makes paths within the cache true at its new place, and gives directories their modes and times."""
    if job.root.kind in _WITH_GROUPS:
        together = set(job.paths)
        for path in job.groups:
            _rewrite_group(job, path, together)
    for path, mode, mtime_ns in reversed(job.directories):
        directory = job.staging / path
        directory.chmod(mode | 0o700)
        os.utime(directory, ns=(mtime_ns, mtime_ns))
    job.staging.chmod(0o755)


def _rewrite_group(job: _Job, path: PurePosixPath, together: Collection[PurePosixPath]) -> None:
    """Lets a group of Triton's name its files where they are now: it holds absolute paths, and Triton takes
    the whole group for missing if one of them is."""
    file = job.staging / path
    try:
        document = json.loads(file.read_bytes())
    except (ValueError, RecursionError):  # Triton compiles anew then
        return
    children = document.get("child_paths") if isinstance(document, dict) else None
    if not isinstance(children, dict):
        return
    moved = {
        name: str(job.target / path.parent / name) if path.parent / name in together else old
        for name, old in children.items()
        if "/" not in name
    }
    if moved == children:
        return
    status = file.stat()
    with open(file, "r+b") as opened:
        opened.write(json.dumps({**document, "child_paths": moved}).encode())
        opened.truncate()
    os.utime(file, ns=(status.st_mtime_ns, status.st_mtime_ns))


def _publish(job: _Job, *, overwrite: bool) -> ExtractedRoot:
    """Lets the cache be seen: in one step if nothing is there, or else entry by entry."""
    target = Path(os.path.realpath(job.target))
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        with contextlib.suppress(OSError):  # somebody has put one there meanwhile
            os.rename(job.staging, target)  # noqa: PTH104 - onto an empty directory, too
            return ExtractedRoot(
                kind=job.root.kind,
                path=job.target,
                files=job.root.files,
                bytes=job.root.bytes,
                kept=(),
                written=tuple(job.paths),
            )
    try:
        there = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except NotADirectoryError:
        raise UsageError(f"{job.target} is no directory", hint="--to DIR chooses another place") from None
    try:
        return _merge(job, there, overwrite=overwrite)
    finally:
        os.close(there)


def _merge(job: _Job, there: int, *, overwrite: bool) -> ExtractedRoot:
    groups: dict[str, list[PurePosixPath]] = {}
    for path in job.paths:
        key = entry_key(job.root.kind, path)
        # What is kept by no key stands for itself, but for CUDA's cache, whose index belongs to all of it.
        whole = key != "." or job.root.kind is CacheKind.CUDA
        groups.setdefault(key if whole else str(path), []).append(path)
    modes = {path: (mode, mtime_ns) for path, mode, mtime_ns in job.directories}
    kept: list[str] = []
    written: list[PurePosixPath] = []
    size = replaced = 0
    for key, paths in groups.items():
        states = {path: _compare(job.staging / path, there, path) for path in paths}
        if "blocked" in states.values() or ("different" in states.values() and not overwrite):
            kept.append(key)
            continue
        for path, state in states.items():
            if state != "same":
                size += (job.staging / path).stat().st_size
                _move(job.staging, there, path, modes, replace=overwrite)
                if state == "absent":
                    written.append(path)
                else:
                    replaced += 1
    return ExtractedRoot(
        kind=job.root.kind,
        path=job.target,
        files=len(written) + replaced,
        bytes=size,
        kept=tuple(sorted(kept)),
        written=tuple(written),
    )


def _compare(staged: Path, there: int, path: PurePosixPath) -> str:
    """What is at a path: `absent`, `same`, `different`, or `blocked` by what is no file of a cache."""
    try:
        parent = _open_below(there, path.parent)
    except FileNotFoundError:
        return "absent"
    except OSError:  # a link or a file where a directory should be
        return "blocked"
    try:
        fd = os.open(path.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=parent)
    except FileNotFoundError:
        return "absent"
    except OSError:
        return "blocked"
    finally:
        os.close(parent)
    with open(fd, "rb", buffering=0) as old, open(staged, "rb", buffering=0) as new:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            return "blocked"
        if status.st_size != os.fstat(new.fileno()).st_size:
            return "different"
        while piece := new.read(_COMPARED_BYTES):
            if old.read(len(piece)) != piece:
                return "different"
    return "same"


def _move(
    staging: Path,
    there: int,
    path: PurePosixPath,
    modes: Mapping[PurePosixPath, tuple[int, int]],
    *,
    replace: bool,
) -> None:
    """Moves one file to where it goes. Readers see it whole or not at all."""
    at = PurePosixPath()
    parent = os.dup(there)
    try:
        for part in path.parts[:-1]:
            at /= part
            with contextlib.suppress(FileExistsError):
                os.mkdir(part, modes[at][0] | 0o700, dir_fd=parent)
            inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
            os.close(parent)
            parent = inner
        if replace:
            os.rename(staging / path, path.name, dst_dir_fd=parent)
            return
        # A link and not a rename: somebody may have put the same entry there meanwhile, and theirs stays.
        try:
            os.link(staging / path, path.name, dst_dir_fd=parent, follow_symlinks=False)
        except FileExistsError:
            return
        except OSError:  # a file system without hard links
            os.rename(staging / path, path.name, dst_dir_fd=parent)
            return
        (staging / path).unlink()
    finally:
        os.close(parent)
