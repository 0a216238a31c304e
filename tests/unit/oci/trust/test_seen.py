# SPDX-License-Identifier: Apache-2.0
"""An older image under a tag is refused by all of a host's homes; a local name is that of one home."""

import os
from datetime import UTC, datetime
from pathlib import Path

import pytest

from oci.reference import parse
from oci.trust import seen
from oci.trust.verifier import Trust
from rekindle.errors import TrustError
from rekindle.home import Home

OLD, NEW = (Trust(by="me", created=datetime(2026, 1, day, tzinfo=UTC)) for day in (1, 2))
TAG = "registry.example.com/models/tiny:1"


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REKINDLE_STATE", str(tmp_path / "state"))
    return tmp_path / "state"


@pytest.mark.parametrize("name", [TAG, "oci:/srv/images:1"])
def test_another_home_of_the_host_remembers(tmp_path: Path, state: Path, name: str) -> None:
    seen.refuse_older(parse(name), Home(tmp_path / "one"), NEW)
    assert state.stat().st_mode & 0o777 == 0o700
    other = Home(tmp_path / "other")
    seen.refuse_older(parse(name), other, NEW)
    for trust in (OLD, Trust(by="me", created=None)):
        with pytest.raises(TrustError, match="older than an image seen before"):
            seen.refuse_older(parse(name), other, trust)
    assert not (other.root / "seen.json").exists()


def test_a_name_in_the_local_store_is_of_one_home(tmp_path: Path, state: Path) -> None:
    seen.refuse_older(parse("tiny"), Home(tmp_path / "one"), NEW)
    seen.refuse_older(parse("tiny"), Home(tmp_path / "other"), OLD)
    assert not state.exists()


def test_what_the_home_has_seen_before_still_counts(
    tmp_path: Path, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = Home(tmp_path / "one")
    monkeypatch.setenv("REKINDLE_STATE", str(home.root))
    seen.refuse_older(parse(TAG), home, NEW)
    monkeypatch.setenv("REKINDLE_STATE", str(state))
    with pytest.raises(TrustError):
        seen.refuse_older(parse(TAG), home, OLD)


@pytest.mark.parametrize("what", ["a file", "a link", "writable for others"])
def test_a_directory_that_others_could_have_made_is_not_used(tmp_path: Path, state: Path, what: str) -> None:
    match what:
        case "a file":
            state.touch()
        case "a link":
            (tmp_path / "theirs").mkdir()
            state.symlink_to(tmp_path / "theirs")
        case _:
            state.mkdir()
            state.chmod(0o777)
    home = Home(tmp_path / "one")
    seen.refuse_older(parse(TAG), home, NEW)
    with pytest.raises(TrustError):
        seen.refuse_older(parse(TAG), home, OLD)
    assert (home.root / "seen.json").exists()
    assert state.is_file() or os.listdir(state) == []
