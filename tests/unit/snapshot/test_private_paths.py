# SPDX-License-Identifier: Apache-2.0
"""What a server made itself is told by the times of birth, also on overlayfs."""

from pathlib import Path
from typing import Any, cast

import pytest

from rekindle.cell import Cell
from snapshot import private_paths

SINCE = 1000
BEFORE, AFTER = 999, 1001


class FakeCell:
    only = None

    def __init__(self, root: Path) -> None:
        self.root = root


@pytest.fixture
def births(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """The times of birth, by the names of files; those that are not here are after the start."""
    found: dict[str, int] = {}
    monkeypatch.setattr(private_paths, "_birth_ns", lambda path: found.get(Path(path).name, AFTER))
    return found


@pytest.fixture
def made(tmp_path: Path) -> private_paths._Made:
    for name in ("app/lib/code.py", "app/log", "other/log"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    environment = {"RUNTIME_DIRECTORY": "/run/one:/run/two/", "XDG_RUNTIME_DIR": ""}
    return private_paths._Made(cast("Cell", FakeCell(tmp_path)), SINCE, environment)


def test_a_directory_is_the_servers_if_nothing_in_it_is_older(
    made: private_paths._Made, births: dict[str, int], tmp_path: Path
) -> None:
    cell = cast("Cell", FakeCell(tmp_path))
    assert made.directory("/app")
    assert private_paths._is_small(cell, "/app", made)
    births["code.py"] = BEFORE  # overlayfs has copied up the directories above it
    assert made.directory("/app")
    assert not private_paths._is_small(cell, "/app", made)
    assert not made.directory("/app/lib")
    births["lib"] = BEFORE
    assert not made.directory("/app")
    assert made.directory("/other")
    births["other"] = BEFORE
    assert not made.directory("/other")
    assert not made.directory("/")
    assert not made.directory("/missing")


@pytest.mark.parametrize(
    ("path", "is_own"),
    [
        ("/other/log", False),
        ("/run/one/log", True),
        ("/run/two/deep/log", True),
        ("/run/twolog", False),
        ("/tmp/hsperfdata_root/1002", True),
        ("/tmp/hsperfdata_root/1002/x", False),
    ],
)
def test_a_file_is_the_servers_if_it_is_younger_or_in_a_runtime_directory(
    made: private_paths._Made, births: dict[str, int], path: str, is_own: bool
) -> None:
    births.update(dict.fromkeys(("log", "1002", "x", "twolog"), BEFORE))
    assert made.file(path) is is_own


LOCKED = "pos:\t0\nflags:\t0{}\nmnt_id:\t30\nino:\t7\nlock:\t1: FLOCK  ADVISORY  {} 1002 08:01:7 0 EOF\n"


@pytest.mark.parametrize(
    ("info", "how"),
    [
        ("pos:\t0\nflags:\t0100000\nmnt_id:\t30\n", ""),
        ("pos:\t0\nflags:\t0100001\nmnt_id:\t30\n", "is open for writing"),
        ("pos:\t0\nflags:\t0100002\nmnt_id:\t30\n", "is open for writing"),
        ("pos:\t0\nflags:\t010000002\nmnt_id:\t30\n", ""),  # O_PATH
        (LOCKED.format("100000", "READ"), ""),
        (LOCKED.format("100000", "WRITE"), "is locked for this process alone"),
    ],
)
def test_what_replicas_would_share_shows_in_proc(tmp_path: Path, info: str, how: str) -> None:
    (tmp_path / "file").touch()
    status: Any = (tmp_path / "file").stat()
    assert private_paths._how(status, info) == how
