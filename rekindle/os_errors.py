# SPDX-License-Identifier: Apache-2.0
"""Convert errors of the operating system to our own."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from rekindle.errors import RekindleError, SpaceError, UsageError

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
FORBIDDEN = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
_ELSEWHERE = FORBIDDEN | {errno.ENOTDIR, errno.EISDIR}


def from_os_error(error: OSError) -> RekindleError | None:
    """Convert an error that the user can mend; return None for one that counts as a bug."""
    if error.errno in FULL:
        return full_disk(error.filename or "here", cause=str(error))
    if error.errno in _ELSEWHERE and error.filename:
        return UsageError(f"cannot use {error.filename}", cause=str(error))
    if error.errno == errno.ENOENT and not _is_absolute(error.filename) and _is_working_directory_gone():
        return UsageError(
            "the working directory does not exist any more",
            cause=str(error),
            hint="change to a directory that exists",
        )
    return None


def _is_absolute(name: object) -> bool:
    """Tell whether an error names an absolute path; os.getcwd() names none."""
    return isinstance(name, str | bytes) and Path(os.fsdecode(name)).is_absolute()


def _is_working_directory_gone() -> bool:
    try:
        os.getcwd()  # noqa: PTH109 - Path.cwd() is the same
    except FileNotFoundError:
        return True
    return False


_DISK_HINT = "free some space, or set REKINDLE_HOME to a directory on a larger disk"


@contextlib.contextmanager
def naming_full_disk(place: Path | str, *, hint: str = _DISK_HINT) -> Iterator[None]:
    """Convert "no space left" and "quota exceeded" in the context to a SpaceError that names the place."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise full_disk(place, cause=str(error), hint=hint) from error


def full_disk(place: Path | str, *, cause: str, hint: str = _DISK_HINT) -> SpaceError:
    """Return the error for a full disk."""
    return SpaceError(f"no space left below {place}", cause=cause, hint=hint)
