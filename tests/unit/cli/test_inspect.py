# SPDX-License-Identifier: Apache-2.0
"""What a stranger wrote into a record is shown as text, and does nothing to the terminal."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from oci import image, media_types
from oci.layout import Layout
from rekindle.record import Record
from tests.samples.record import FULL_RECORD


def inspect(tmp_path: Path, record: Record, *flags: str) -> "subprocess.CompletedProcess[bytes]":
    work = Layout.create(tmp_path / "work")
    layers = [work.put(b"layer", media_types.DUMP_LAYER)]
    Layout.create(tmp_path / "layout").publish(work, image.build(work, record, layers).index, "x")
    return subprocess.run(
        [sys.executable, "-m", "rekindle", "inspect", f"oci:{tmp_path / 'layout'}:x", *flags],
        env={**os.environ, "REKINDLE_HOME": str(tmp_path / "home")},
        capture_output=True,
        timeout=60,
        check=False,
    )


def test_a_record_is_shown(tmp_path: Path) -> None:
    done = inspect(tmp_path, FULL_RECORD)
    assert done.returncode == 0, done.stderr
    assert b"server --port 8000" in done.stdout
    assert not (tmp_path / "home/dumps").exists() or not list((tmp_path / "home/dumps").iterdir())


def test_what_replicas_have_of_their_own_and_what_was_closed_is_shown(tmp_path: Path) -> None:
    private = tuple(f"/srv/{number}.lock" for number in range(7))
    process = structs.replace(FULL_RECORD.process, private=private, closed=("unix:/run/agent.sock",))
    shown = inspect(tmp_path, structs.replace(FULL_RECORD, process=process)).stdout.decode()
    assert "own files   a copy for each replica of /srv/0.lock, " in shown
    assert "/srv/4.lock and 2 more\n" in shown
    assert "closed      unix:/run/agent.sock\n" in shown


def test_a_record_is_printed_whole(tmp_path: Path) -> None:
    done = inspect(tmp_path, FULL_RECORD, "--json")
    document = json.loads(done.stdout)
    assert document["schema"] == "rekindle.inspect/1"
    assert Record.parse(json.dumps(document["record"]).encode()) == FULL_RECORD


CHANGES: dict[str, dict[str, Any]] = {
    "escape": {"created": "\x1b]0;title\x07"},
    "return": {"directory": "/\rfits here   yes"},
    "half a character": {"created": "\ud800"},
    "in the command": {"command": ["serve", "\x1b[2J"]},
}


def test_text_of_a_record_makes_no_line_of_its_own(tmp_path: Path) -> None:
    done = inspect(tmp_path, structs.replace(FULL_RECORD, made_by="x\nfits here   yes"))
    assert b"\nfits here   yes" not in done.stdout


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_text_of_a_record_does_nothing(tmp_path: Path, changes: dict[str, Any]) -> None:
    plain = inspect(tmp_path, FULL_RECORD)
    done = inspect(tmp_path / "other", structs.replace(FULL_RECORD, **changes))
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(plain.stdout.splitlines())
    assert all(character.isprintable() or character == "\n" for character in done.stdout.decode())
