# SPDX-License-Identifier: Apache-2.0
"""Find a CRIU that works here, and remember it.

tools/criu-that-work.json   {IDENTITY of the CRIU, the OS kernel and our privileges: VERSION}
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rekindle.criu import Criu, kernel_facts
from rekindle.errors import CapabilityError
from rekindle.files import write_atomically
from rekindle.home import Home, expand_user
from rekindle.proc import has_filter, standing

if TYPE_CHECKING:
    from rekindle.criu.trial import CriuCandidate

_INSTALL_HINT = "run `hack/get-criu` to install one that works, or set REKINDLE_CRIU to yours"
FILTER_HINT = "take snapshots without the filter: --security-opt=seccomp=unconfined of a container"
_KNOWN, _KNOWN_LIMIT = "criu-that-work.json", 50


def find(home: Home) -> Criu:
    """Return the first CRIU that works: `$REKINDLE_CRIU`, or else one on PATH or from hack/get-criu.

    Remembers that a CRIU works until it, the OS kernel or our privileges change, and for an hour that it does
    not. Raises CapabilityError if none works.
    """
    known = home.tools / _KNOWN
    remembered = _read_known(known)
    tried = []
    for path in _paths():
        identity = _identity(path)
        if identity in remembered:
            return Criu(path=path, version=remembered[identity])
        from rekindle.criu import trial

        candidate = trial.known_failure(home, path, identity) or trial.run(home, path, identity)
        if not candidate.problem:
            write_atomically(known, json.dumps(_newest({**remembered, identity: candidate.version})).encode())
            kernel_facts.learn(home, path)
            return Criu(path=path, version=candidate.version)
        tried.append(candidate)
    if not tried:
        raise CapabilityError("CRIU is not installed", hint=_INSTALL_HINT)
    last = tried[-1]
    raise CapabilityError(
        f"CRIU {last.version} ({last.path}) does not work on Linux {os.uname().release}",
        cause=last.problem,
        hint=_INSTALL_HINT,
    )


def find_for_dump(home: Home) -> Criu:
    """Return a CRIU that can dump a server here. Raises CapabilityError."""
    if problem := dump_problem():
        raise CapabilityError("no snapshot can be taken here", cause=problem, hint=FILTER_HINT)
    return find(home)


def dump_problem() -> str:
    """Return why servers can be restored here but not dumped, or ""."""
    if not has_filter():
        return ""
    return "CRIU cannot dump a process with a filter of system calls (seccomp) if it has one itself"


def candidates(home: Home) -> Iterator["CriuCandidate"]:
    """Find every CRIU and try each now."""
    from rekindle.criu import trial

    return (trial.run(home, path, _identity(path)) for path in _paths())


def _paths() -> list[Path]:
    if chosen := os.environ.get("REKINDLE_CRIU"):
        return [Path(chosen).absolute()]
    directories = os.get_exec_path()
    if prefix := _prefix():
        directories.append(f"{prefix}/bin")
    found = (Path(directory or ".", "criu") for directory in dict.fromkeys(directories))
    # os.access first: is_file raises PermissionError in a directory that we may not read.
    works = (path.absolute() for path in found if os.access(path, os.X_OK) and path.is_file())
    return list(dict.fromkeys(works))


def _prefix() -> Path | None:
    """Return the directory into which hack/get-criu installs; None for a user without a home directory."""
    if prefix := os.environ.get("REKINDLE_PREFIX"):
        return Path(prefix)
    cache = os.environ.get("XDG_CACHE_HOME")
    directory = Path(cache) if cache else expand_user("~/.cache")
    return directory and directory / "rekindle"


def _identity(path: Path) -> str:
    try:
        status = path.stat()
    except OSError:
        return f"{path} missing"
    return f"{path} {status.st_size} {status.st_mtime_ns} on {os.uname().release} as {standing()}"


def _newest(remembered: Mapping[str, str]) -> dict[str, str]:
    return dict(list(remembered.items())[-_KNOWN_LIMIT:])


def _read_known(path: Path) -> dict[str, str]:
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return {str(key): str(version) for key, version in json.loads(path.read_bytes()).items()}
    return {}
