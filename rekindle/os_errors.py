# SPDX-License-Identifier: Apache-2.0
"""Errors of the operating system as errors of ours."""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from rekindle.errors import RekindleError, SpaceError, UsageError

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
FORBIDDEN = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
_ELSEWHERE = FORBIDDEN | {errno.ENOTDIR, errno.EISDIR}


def from_os_error(error: OSError) -> RekindleError | None:
    """Return what the system refuses as an error of ours; None for what counts as a bug."""
    if error.errno in FULL:
        return full_disk(error.filename or "here", cause=str(error))
    if error.errno in _ELSEWHERE and error.filename:
        return UsageError(f"{error.filename} cannot be used", cause=str(error))
    return None


_DISK_HINT = "free some, or set REKINDLE_HOME to a directory on a larger disk"


@contextlib.contextmanager
def naming_full_disk(place: Path | str, *, hint: str = _DISK_HINT) -> Iterator[None]:
    """Turns "no space left" and "quota exceeded" within the block into a SpaceError that names the place."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise full_disk(place, cause=str(error), hint=hint) from error


def full_disk(place: Path | str, *, cause: str, hint: str = _DISK_HINT) -> SpaceError:
    """Return the error for a disk that is full."""
    return SpaceError(f"no space left below {place}", cause=cause, hint=hint)
