# SPDX-License-Identifier: Apache-2.0
"""File operations: atomic writes, locks, sparse copies and the page cache."""

import contextlib
import errno
import fcntl
import io
import os
import stat
import time
from collections.abc import Collection, Iterator
from pathlib import Path

from rekindle.errors import BusyError, IntegrityError

PAGE_BYTES = 4096
_FALLOC_FL_KEEP_SIZE, _FALLOC_FL_PUNCH_HOLE = 1, 2  # linux/falloc.h
_COPY_BYTES = 1 << 20
_NOT_REGULAR = {errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENXIO, errno.ENODEV}


def write_atomically(path: Path, content: bytes, *, mode: int = 0o644) -> None:
    """Replace a file atomically. Readers see the old content or the new, even after a power failure."""
    staged = path.with_name(f".{path.name}.{os.urandom(6).hex()}")
    try:
        fd = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
        with open(fd, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(fd)
        staged.replace(path)
    except BaseException:
        staged.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def open_regular(path: Path) -> io.FileIO:
    """Open a file for reading that others may have put there. Raises IntegrityError for what is no file.

    A link may lead anywhere, and a plain open of a pipe waits for ever for its writer.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno not in _NOT_REGULAR:
            raise
        raise IntegrityError(f"{path} is not a regular file", cause=str(error)) from None
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        os.close(fd)
        raise IntegrityError(f"{path} is not a regular file", cause=stat.filemode(mode))
    return open(fd, "rb", buffering=0)


def move_file(source: Path, target: Path) -> None:
    """Move a file, between disks by way of a staged copy: the target is whole or absent."""
    try:
        source.replace(target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        staged = target.with_name(f".staged-{target.name}")
        try:
            from shutil import copyfile  # rarely needed, and slow to import

            copyfile(source, staged)
            with open(staged, "rb") as file:
                os.fsync(file.fileno())
            staged.replace(target)
        finally:
            staged.unlink(missing_ok=True)


def sync_directory(path: Path) -> None:
    """Make renames in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_at(fd: int, content: memoryview, offset: int) -> int:
    """Write a whole buffer at an offset; return its length.

    A single pwrite may write less: on a disk that becomes full, it writes what fits and raises nothing. The
    next one raises.
    """
    written = 0
    while written < len(content):
        written += os.pwrite(fd, content[written:], offset + written)
    return written


def remove_tree(path: Path) -> None:
    """Remove a directory and everything below it. Idempotent; does not follow symbolic links."""
    with contextlib.suppress(FileNotFoundError):
        from shutil import rmtree  # it loads compressors that a restore does not need

        rmtree(path)


@contextlib.contextmanager
def locked(path: Path, *, shared: bool = False, timeout: float = 60.0) -> Iterator[None]:
    """Hold an advisory lock on a file, which is created if it does not exist.

    The OS kernel releases the lock however the process ends. Its holder may remove the file. Raises
    BusyError after `timeout` seconds.
    """
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            if not try_lock(fd, shared=shared, timeout=timeout):
                raise BusyError(
                    f"another rekindle holds the lock {path}",
                    hint=f"wait for it to end; `fuser -v {path}` shows it",
                )
            if not is_at(fd, path):  # its last holder has removed it
                continue
            yield
            return
        finally:
            os.close(fd)


def is_at(fd: int, path: Path) -> bool:
    """Return whether an open file is still the one at a path; the last holder of a lock may remove it."""
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


def try_lock(fd: int, *, shared: bool = False, timeout: float = 0.0) -> bool:
    """Take an advisory lock on an open file; return False if it is still held after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    operation = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    while True:
        try:
            fcntl.flock(fd, operation | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.01)


def data_extents(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield the (offset, length) of each extent of a sparse file that is not a hole."""
    offset = 0
    while offset < size:
        try:
            start = os.lseek(fd, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole is left
                return
            raise
        offset = min(os.lseek(fd, start, os.SEEK_HOLE), size)
        yield start, offset - start


def copy_sparse_tree(source: Path, target: Path, *, without: Collection[str] = ()) -> int:
    """Copy the content of a directory into an existing one; return the number of bytes written.

    Keeps holes, modes, owners, times and hard links. Leaves out sockets, which their owner creates again,
    other special files except FIFOs, and the entries of `source` that are named in `without`.
    """
    links: dict[tuple[int, int], Path] = {}
    made: list[tuple[Path, os.stat_result]] = []
    written = 0
    for directory, names, filenames in os.walk(source):
        if Path(directory) == source:
            names[:] = [name for name in names if name not in without]
        here = target / Path(directory).relative_to(source)
        for name in [*names, *filenames]:
            origin, copy = Path(directory, name), here / name
            status = origin.lstat()
            identity = (status.st_dev, status.st_ino)
            if status.st_nlink > 1 and identity in links and not stat.S_ISDIR(status.st_mode):
                os.link(links[identity], copy)
                continue
            if stat.S_ISDIR(status.st_mode):
                copy.mkdir(exist_ok=True)
            elif stat.S_ISLNK(status.st_mode):
                copy.symlink_to(origin.readlink())
            elif stat.S_ISFIFO(status.st_mode):
                os.mkfifo(copy)
            elif stat.S_ISREG(status.st_mode):
                written += _copy_sparse_file(origin, copy, status.st_size)
            else:
                continue
            links[identity] = copy
            made.append((copy, status))
    for copy, status in reversed(made):  # directories after their content, since writing changes their times
        copy_attributes(copy, status)
    return written


def copy_path(source: Path, target: Path) -> None:
    """Copy a file, or a directory with its content, to a path that does not exist, as `copy_sparse_tree`."""
    status = source.lstat()
    if stat.S_ISDIR(status.st_mode):
        target.mkdir(mode=0o700)
        copy_sparse_tree(source, target)
    elif stat.S_ISFIFO(status.st_mode):
        os.mkfifo(target)
    else:
        _copy_sparse_file(source, target, status.st_size)
    copy_attributes(target, status)


def copy_attributes(path: Path, status: os.stat_result) -> None:
    """Set the owner, mode and times of a file to those in `status`."""
    os.chown(path, status.st_uid, status.st_gid, follow_symlinks=False)
    if not stat.S_ISLNK(status.st_mode):
        path.chmod(stat.S_IMODE(status.st_mode))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns), follow_symlinks=False)


def _copy_sparse_file(source: Path, target: Path, size: int) -> int:
    written = 0
    buffer = memoryview(bytearray(_COPY_BYTES))
    with open(source, "rb", buffering=0) as reader, open(target, "xb", buffering=0) as writer:
        writer.truncate(size)
        for start, length in data_extents(reader.fileno(), size):
            offset, end = start, start + length
            while offset < end:
                count = os.preadv(reader.fileno(), [buffer[: end - offset]], offset)
                if count == 0:
                    break
                for run_start, run_end in nonzero_runs(bytes(buffer[:count])):
                    written += write_at(writer.fileno(), buffer[run_start:run_end], offset + run_start)
                offset += count
    return written


def nonzero_runs(content: bytes) -> Iterator[tuple[int, int]]:
    """Yield the (start, end) of each run of pages that are not all zero; the last page may be short."""
    zero = bytes(PAGE_BYTES)
    start = None
    for offset in range(0, len(content), PAGE_BYTES):
        page = content[offset : offset + PAGE_BYTES]
        if page == zero or (len(page) < PAGE_BYTES and not any(page)):
            if start is not None:
                yield start, offset
                start = None
        elif start is None:
            start = offset
    if start is not None:
        yield start, len(content)


def disk_bytes(path: Path) -> int:
    """Return the size of the file system that a path is on."""
    disk = os.statvfs(path)
    return disk.f_frsize * disk.f_blocks


def free_bytes(path: Path) -> int:
    """Return the bytes that users may still write to the file system that a path is on."""
    disk = os.statvfs(path)
    return disk.f_frsize * disk.f_bavail


def size_bytes(directory: Path) -> int:
    """Return the bytes of the files in a directory, which has no other directories."""
    return sum(path.stat().st_size for path in directory.iterdir())


def files_below(directory: Path) -> list[Path]:
    """Return the regular files of a tree, sorted; does not follow symbolic links."""
    return [path for path in sorted(directory.rglob("*")) if path.is_file() and not path.is_symlink()]


def write_back(directory: Path) -> None:
    """Write the files of a tree back to the disk.

    Only clean pages can be dropped from the page cache, and a later write-back would disturb measurements.
    """
    for path in files_below(directory):
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def drop_from_page_cache(directory: Path) -> None:
    """Drop the files of a tree from the page cache, so that the next reader reads them from the disk."""
    for path in files_below(directory):
        drop_file_from_page_cache(path)


def drop_file_from_page_cache(path: Path) -> None:
    """Drop a file from the page cache. What a process has mapped, or has yet to be written, stays."""
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Make a range of a file a hole, which reads as zeros. Raises OSError where the file system cannot."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    arguments = (ctypes.c_int64(offset), ctypes.c_int64(length))
    if libc.fallocate(fd, _FALLOC_FL_KEEP_SIZE | _FALLOC_FL_PUNCH_HOLE, *arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"fallocate: {os.strerror(number)}")
