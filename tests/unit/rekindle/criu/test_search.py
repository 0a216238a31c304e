# SPDX-License-Identifier: Apache-2.0
"""Where a CRIU is looked for."""

import os
from pathlib import Path

import pytest

from rekindle.criu import search
from rekindle.errors import CapabilityError
from rekindle.home import Home


def write_program(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\nexit 1\n")
    path.chmod(0o755)
    return path


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("REKINDLE_CRIU", "REKINDLE_PREFIX", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def test_path_comes_before_the_installed_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_path = write_program(tmp_path / "bin/criu")
    in_home = write_program(tmp_path / "home/.cache/rekindle/bin/criu")
    assert search._paths() == [on_path, in_home]
    in_cache = write_program(tmp_path / "cache/rekindle/bin/criu")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert search._paths() == [on_path, in_cache]
    in_prefix = write_program(tmp_path / "prefix/bin/criu")
    monkeypatch.setenv("REKINDLE_PREFIX", str(tmp_path / "prefix"))
    assert search._paths() == [on_path, in_prefix]
    chosen = tmp_path / "chosen"
    monkeypatch.setenv("REKINDLE_CRIU", str(chosen))
    assert search._paths() == [chosen]


def test_a_user_without_a_home_has_none_installed_in_it(homeless: None, home: Home, tmp_path: Path) -> None:
    with pytest.raises(CapabilityError, match="CRIU is not installed"):
        search.find(home)
    on_path = write_program(tmp_path / "bin/criu")
    assert search._paths() == [on_path]


def test_a_directory_on_path_that_may_not_be_read_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_program(tmp_path / "bin/criu")

    def refuse(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_file", refuse)
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert search._paths() == []
