# SPDX-License-Identifier: Apache-2.0
"""Start a process that has imported what a server imports, and tell it later which command to be.

/dev/shm/rekindle-neutral/   in the cell, and part of its snapshot
    process.py               neutral_process.py, which describes the other files
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from rekindle.cell import neutral_process
from rekindle.fields import JSON
from rekindle.files import write_atomically

DIRECTORY = Path("/dev/shm/rekindle-neutral")  # noqa: S108 - in the cell's private file system
PROGRAM = DIRECTORY / "process.py"


def install(root: Path, files: Sequence[str], script: str) -> None:
    """Put the program into the file system of a cell, with the files to import and the program to become."""
    directory = _inside(root)
    directory.mkdir(mode=0o755)
    source = Path(neutral_process.__file__).read_bytes()
    write_atomically(directory / "process.py", source)
    write_atomically(directory / "plan.json", json.dumps({"files": list(files), "script": script}).encode())


def facts(root: Path) -> dict[str, JSON] | None:
    """Return what a process that waits tells of itself; None until it waits."""
    try:
        found = json.loads((_inside(root) / "waiting.json").read_bytes())
    except FileNotFoundError:
        return None
    assert isinstance(found, dict)
    return found


def send(root: Path, argv: Sequence[str], environment: Mapping[str, str], directory: Path) -> None:
    """Tell a process that waits which command it is, and where."""
    umask = os.umask(0o077)
    os.umask(umask)
    command = {
        "argv": list(argv),
        "environment": dict(environment),
        "directory": str(directory),
        "umask": umask,
    }
    # Read by that process alone, which removes it: it may hold secrets.
    write_atomically(_inside(root) / "command.json", json.dumps(command).encode(), mode=0o600)


def _inside(root: Path) -> Path:
    return root / DIRECTORY.relative_to("/")
