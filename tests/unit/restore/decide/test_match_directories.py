# SPDX-License-Identifier: Apache-2.0
"""Which directories of a node keep a server from running there."""

import os
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from rekindle.record import NeededDirectory
from restore.decide import match_directories
from restore.decide.rules import RULES
from tests.samples.record import RECORD


def differences(
    *directories: NeededDirectory, private: tuple[str, ...] = (), made: tuple[str, ...] = ()
) -> list[tuple[str, str, str]]:
    process = structs.replace(RECORD.process, directories=directories, private=private, made=made)
    found = list(match_directories.compare(structs.replace(RECORD, process=process)))
    assert {each.code for each in found} <= {code for code, rule in RULES.items() if rule.hard}
    return [(each.field, each.recorded, each.here) for each in found]


@pytest.fixture
def read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that is read-only, also to root."""
    place = tmp_path / "read-only"
    place.mkdir()
    asked = os.access
    monkeypatch.setattr(os, "access", lambda path, *how: Path(path) != place and asked(path, *how))
    return place


@pytest.mark.parametrize("kind", [{}, {"made": True}, {"written": True}, {"made": True, "written": True}])
def test_a_directory_that_is_there_and_writable_is_enough(tmp_path: Path, kind: dict[str, Any]) -> None:
    assert differences(NeededDirectory(path=str(tmp_path), **kind)) == []


def test_what_the_server_has_not_made_must_be_there(tmp_path: Path) -> None:
    path = str(tmp_path / "missing")
    assert differences(NeededDirectory(path=path)) == [(path, "there", "missing")]
    for kind in ({"made": True}, {"written": True}):
        assert differences(NeededDirectory(path=f"{path}/below", **kind)) == []


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    path = str(tmp_path / "file")
    assert differences(NeededDirectory(path=path, made=True)) == [
        (path, "made by the server", "not a directory")
    ]


def test_what_must_be_made_needs_a_place(read_only: Path) -> None:
    missing = str(read_only / "a" / "b")
    here = f"missing, and {read_only} is read-only"
    assert differences(NeededDirectory(path=missing, made=True)) == [(missing, "made by the server", here)]
    assert differences(private=(missing,)) == [(missing, "made by the server", here)]
    assert differences(made=(missing,)) == [(missing, "made by the server", here)]
    assert differences(NeededDirectory(path=str(read_only), made=True), private=(str(read_only),)) == []
    assert differences(NeededDirectory(path=str(read_only), written=True)) == [
        (str(read_only), "writable", "read-only")
    ]
