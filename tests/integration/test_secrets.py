# SPDX-License-Identifier: Apache-2.0
"""A server that holds credentials is not saved, and nobody is told what they are."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Rekindle, workhorse_flags

pytestmark = pytest.mark.criu
NothingLeft = Callable[[], None]

KEY = "Zq8-vixen-41-Lark"
TOKEN = "hf_" + "qW3eR5tY7uI9oP1aS3dF5gH7jK9lZ1xC3v"  # seeded by this test, and valid nowhere
PASSWORD = "oats+hay=9"


def holds(directory: Path, value: str) -> list[Path]:
    """The files below a directory that hold a value, or have it in their name."""
    found = [path for path in directory.rglob("*") if value in path.name]
    return found + [p for p in directory.rglob("*") if p.is_file() and value.encode() in p.read_bytes()]


def test_a_secret_in_the_environment_refuses_the_snapshot(
    rekindle: Rekindle, port: int, tmp_path: Path, nothing_left: NothingLeft
) -> None:
    rekindle.env |= {"STABLE_API_KEY": KEY}
    report = tmp_path / "report.json"
    done = rekindle.snapshot_workhorse("horse", port, flags=["--report", str(report)])
    assert done.status == 36, done.stderr
    assert "the value of STABLE_API_KEY" in done.stderr
    assert "in the memory of process" in done.stderr
    assert "--allow-secret STABLE_API_KEY" in done.stderr
    document = json.loads(report.read_text())
    assert document["error"]["code"] == "secret"
    assert "STABLE_API_KEY" in document["error"]["message"]
    assert KEY not in done.stdout + done.stderr + report.read_text()
    assert rekindle("inspect", "horse").status == 12
    assert not holds(rekindle.home, KEY)
    nothing_left()


def test_every_secret_is_named_at_once(rekindle: Rekindle, port: int) -> None:
    rekindle.env |= {"HF_TOKEN": TOKEN, "PROXY": f"http://me:{PASSWORD}@proxy.example:80", "HALTER": TOKEN}
    options = [f"--stall-key={KEY}", "--short-key", "abc"]
    done = rekindle.snapshot_workhorse("horse", port, *options, flags=["--json"])
    assert done.status == 36, done.stderr
    for name in ("HF_TOKEN", "HALTER", "PROXY", "--stall-key", "--short-key"):
        assert f"the value of {name}" in done.json["error"]["message"]
    for value in (KEY, TOKEN, PASSWORD):
        assert value not in done.stdout + done.stderr
        assert not holds(rekindle.home, value)


def test_a_token_that_nobody_named_is_found(rekindle: Rekindle, port: int, tmp_path: Path) -> None:
    """The server reads it from a file, and answers with it."""
    (tmp_path / "told").write_text(TOKEN)
    done = rekindle.snapshot_workhorse("horse", port, f"file={tmp_path / 'told'}", flags=["--json"])
    assert done.status == 36, done.stderr
    assert "a Hugging Face token" in done.json["error"]["message"]
    assert TOKEN not in done.stdout + done.stderr
    flags = ["--json", "--allow-secret", "hugging-face-token", "--no-prove"]
    done = rekindle.snapshot_workhorse("horse", port, f"file={tmp_path / 'told'}", flags=flags)
    assert done.status == 0, done.stderr


def test_an_allowed_secret_is_in_the_memory_and_nowhere_else(
    rekindle: Rekindle, port: int, tmp_path: Path
) -> None:
    rekindle.env |= {"STABLE_API_KEY": KEY, "HF_TOKEN": TOKEN}
    report = tmp_path / "report.json"
    flags = ["--report", str(report), "--allow-secret", "STABLE_API_KEY", "--allow-secret", "HF_TOKEN"]
    flags += ["--allow-secret", "NEVER_HEARD_OF"]
    done = rekindle.snapshot_workhorse("horse", port, "--stall-key", KEY, flags=flags)
    assert done.status == 0, done.stderr
    document = json.loads(report.read_text())
    assert document["allowed_secrets"] == ["HF_TOKEN", "NEVER_HEARD_OF", "STABLE_API_KEY"]
    told = done.stdout + done.stderr + report.read_text() + rekindle("inspect", "horse", "--json").stdout
    for value in (KEY, TOKEN):
        assert value not in told
        stored = holds(rekindle.home, value)
        assert all(path.name.startswith("pages-") or path.parent.name == "memory" for path in stored), stored
    assert "search for secrets" in [phase["name"] for phase in document["phases"]]


def test_one_that_was_not_allowed_still_refuses(rekindle: Rekindle, port: int) -> None:
    rekindle.env |= {"STABLE_API_KEY": KEY, "HF_TOKEN": TOKEN}
    done = rekindle.snapshot_workhorse("horse", port, flags=["--json", "--allow-secret", "STABLE_API_KEY"])
    assert done.status == 36, done.stderr
    message = done.json["error"]["message"]
    assert "HF_TOKEN" in message
    assert "STABLE_API_KEY" not in message


def test_a_server_that_tells_its_secret_and_dies(rekindle: Rekindle, port: int, tmp_path: Path) -> None:
    rekindle.env |= {"STABLE_API_KEY": KEY}
    report = tmp_path / "report.json"
    words = ["sh", "-c", 'echo "key: $STABLE_API_KEY" >&2; exit 3']
    done = rekindle("snapshot", "horse", *workhorse_flags(port), "--report", str(report), "--", *words)
    assert done.status == 30
    assert "key: REDACTED" in done.stderr
    assert list((rekindle.home / "logs").iterdir())
    assert KEY not in done.stdout + done.stderr + report.read_text()
    assert not holds(rekindle.home, KEY)
