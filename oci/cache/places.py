# SPDX-License-Identifier: Apache-2.0
"""The places to which a kernel cache may be extracted because it was recorded there.

A signature makes a signer trusted for kernels, not for the files of the system or of a user. So a recorded
place is taken only if it looks like one of its kind of cache, or if the environment here names it; and never
if it is where the system, or a user's programs, look for what they run or read.
"""

import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from oci.cache.inventory import StoredRoot
from rekindle.engine.caches import VARIABLES, is_usual_place, is_within, path_of
from rekindle.errors import UsageError

# No kernel cache is there, and other programs may run or read files that appear there.
_SYSTEM = (
    *("/bin", "/boot", "/dev", "/etc", "/lib", "/lib32", "/lib64", "/proc", "/sbin", "/sys", "/usr"),
    *("/var/spool", "/var/www"),
)
_SYSTEM_ALLOWED = ("/dev/shm", "/usr/local/share", "/usr/share")  # noqa: S108
_PRIVATE = {
    *(".ssh", ".gnupg", ".config", ".aws", ".kube", ".docker", ".local"),
    *("bin", "sbin", "site-packages", "dist-packages"),
}

# A cache may be in the data directory of a user, but not where programs are started from automatically.
_DATA = (".local", "share")
_STARTED = {"applications", "systemd", "dbus-1", "autostart", "keyrings", "bash-completion", "fish", "zsh"}


def recorded_place(root: StoredRoot, own: Mapping[str, str]) -> Path:
    """Return the recorded place of a cache. Raises UsageError if it may not be extracted to there.

    `own` is the environment of today: a place that it names, or implies, is one that the user has chosen.
    """
    real = os.path.realpath(root.recorded)
    if (
        any(is_within(path, directory) for path in (root.recorded, real) for directory in _SYSTEM)
        and not any(is_within(real, directory) for directory in _SYSTEM_ALLOWED)
    ) or any(_is_private(PurePosixPath(path)) for path in (root.recorded, real)):
        raise UsageError(
            f"the {root.kind} cache was recorded at {root.recorded}, where rekindle does not write",
            hint="extract it to a directory: --to DIR",
        )
    if not is_usual_place(root.kind, root.recorded) and root.recorded != path_of(root.kind, own):
        raise UsageError(
            f"the {root.kind} cache was recorded at {root.recorded}, where rekindle does not write unasked",
            cause=f"nothing in that path tells that it is a {root.kind} cache",
            hint=f"extract it to a directory: --to DIR; or set {VARIABLES[root.kind]} if the path is right",
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
