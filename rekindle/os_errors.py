# SPDX-License-Identifier: Apache-2.0
"""Convert errors of the operating system to our own."""

import contextlib
import errno
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
    return None


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
