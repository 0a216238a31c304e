# SPDX-License-Identifier: Apache-2.0
"""Keep CRIU's facts about the OS kernel, which it would find out at every start.

For that, it makes namespaces, runs iptables and starts processes, for 50 ms and more. It saves the result as
/run/criu.kdat, but only on a tmpfs, and in most containers /run is none. So it is asked once per boot, in a
cell with a tmpfs there. From then on, a cell that starts CRIU shows it the file until CRIU has opened it (see
`rekindle/cell/init.py`): the restored server sees the directory as it is.
"""

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from rekindle.cell import Cell, Command, Network
from rekindle.cell.init import CRIU_FACTS
from rekindle.files import write_atomically
from rekindle.home import Home
from rekindle.proc import privileges

_PLACE = Path(CRIU_FACTS)
_LIMIT_BYTES = 4096  # what a pipe takes at once
_LEARN_SECONDS = 20.0
_OF_CONTAINER = ("pid", "cgroup")


def known(home: Home, criu: Path, *needed: Path) -> bytes | None:
    """Return the facts for a CRIU; None if they are not known, or if it finds them without us.

    `needed` are paths that CRIU needs from its start: none may be in the directory that is covered meanwhile.
    """
    covered = _PLACE.parent
    if _PLACE.exists() or not covered.is_dir():
        return None
    if any(path.resolve().is_relative_to(covered) for path in (criu, home.tools, *needed)):
        return None
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        found = json.loads(_file(home).read_bytes())
        if found["of"] == _identity(criu):
            return bytes.fromhex(found["facts"])
    return None


def learn(home: Home, criu: Path) -> None:
    """Ask a CRIU for its facts, for the next `known`. Takes 0.3 s, once per boot; raises nothing it can help.

    They count only if this CRIU then reads them as it is shown them.
    """
    if _PLACE.exists() or not _PLACE.parent.is_dir() or known(home, criu) is not None:
        return
    facts = _run(criu, b"", read=True)
    if facts is not None and _run(criu, facts) is not None:
        content = {"of": _identity(criu), "facts": facts.hex()}
        with contextlib.suppress(OSError):
            write_atomically(_file(home), json.dumps(content).encode())


def _run(criu: Path, facts: bytes, *, read: bool = False) -> bytes | None:
    """Start CRIU with these facts; return those that it uses then, or None."""
    devnull = Path(os.devnull)
    command = Command(
        argv=[str(criu), "check", "--feature=uffd"],
        env={"PATH": os.environ.get("PATH", os.defpath)},
        cwd=Path("/"),
        files={0: devnull, 1: devnull, 2: devnull},
        criu_facts=facts,
    )
    with Cell() as cell:
        cell.enter(Network.PRIVATE)
        cell.run(command, _LEARN_SECONDS)
        shown = cell.root / CRIU_FACTS.lstrip("/")
        if read:
            with contextlib.suppress(OSError):
                facts = shown.read_bytes()
                return facts if 0 < len(facts) <= _LIMIT_BYTES else None
        elif not shown.exists():  # the directory is no longer covered, since CRIU has opened the file
            return facts
    return None


def _identity(criu: Path) -> Mapping[str, str]:
    status = criu.stat()
    tool = f"{criu} {status.st_size} {status.st_mtime_ns}"
    # Not the namespaces that are new in each container, and change nothing.
    return {"criu": tool, **{name: each for name, each in privileges().items() if name not in _OF_CONTAINER}}


def _file(home: Home) -> Path:
    return home.tools / "criu-facts.json"
