# SPDX-License-Identifier: Apache-2.0
"""Files outside the cell that a server writes to: each replica gets its own, or they are refused."""

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import SERVERS, Rekindle, Replica, free_port, workhorse_flags

pytestmark = pytest.mark.criu

Restore = Callable[..., Replica]


@pytest.fixture
def kept(rekindle: Rekindle, port: int, tmp_path: Path) -> Path:
    """The place of a server whose snapshot is `keeper`; its lock and its log are beside it."""
    place = tmp_path / "room" / "place"
    place.parent.mkdir()
    command = [sys.executable, str(SERVERS / "keeper.py"), str(port), str(place.parent), str(place)]
    done = rekindle("snapshot", "keeper", *workhorse_flags(port), "--", *command)
    assert done.status == 0, done.stderr
    assert str(place) in done.stderr, "the user is told of what is private"
    assert str(place.parent / "log") in done.stderr
    return place


def check(replica: Replica) -> dict[str, Any]:
    return dict(json.loads(replica.ask("/check")))


def expected(place: Path, *written: str) -> dict[str, Any]:
    last = written[-1] if written else ""
    return {
        "map": last,
        "map by name": last,
        "log": ["began", *written],
        "log by name": ["began", *written],
        "settings": "kept",
        "new": [f"new-{each}" for each in sorted(written)],
        "directory": str(place),
        "locked": True,
        "socket": True,
        "library": "code",
    }


def contents(place: Path) -> dict[str, bytes]:
    found = sorted(place.parent.rglob("*"))
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in found}


@contextlib.contextmanager
def read_only(place: Path) -> Iterator[None]:
    subprocess.run(["mount", "--bind", place, place], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", place], check=True)
        yield
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def test_each_replica_has_files_of_its_own(kept: Path, restore: Restore, rekindle: Rekindle) -> None:
    before = contents(kept)
    with read_only(kept.parent):  # what is there can be covered
        one, two = restore("keeper", free_port()), restore("keeper", free_port())
        one.ask("/write?1", {})
        two.ask("/write?2", {})
        one.ask("/write?3", {})
        assert check(one) == expected(kept, "1", "3")
        assert check(two) == expected(kept, "2")
        one.kill()
        two.kill()
    assert contents(kept) == before, "what is outside stays as it was"
    # A fresh pod has nothing of it.
    shutil.rmtree(kept)
    for name in ("lock", "log", "library"):
        (kept.parent / name).unlink()
    with read_only(kept.parent):
        refused = rekindle("restore", "keeper", "--publish", str(free_port()), "--require", "process")
        assert refused.status == 11, refused.stderr
        assert f"directory: {kept} was made by the server, is missing, and {kept.parent}" in refused.stderr
    replica = restore("keeper", free_port(), "--require", "process")
    assert check(replica) == expected(kept)
    replica.ask("/write?4", {})
    assert check(replica) == expected(kept, "4")
    assert (kept.stat().st_mode & 0o777, list(kept.iterdir())) == (0o750, [])
