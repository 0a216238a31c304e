# SPDX-License-Identifier: Apache-2.0
"""Lines are text or JSON, as a variable says."""

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from rekindle import log
from tests.conftest import Rekindle
from tests.samples.registry import make_sample


def lines(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines()]


def test_text_is_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    log.write("half way \x1b[1m")
    log.write_error("no such image")
    assert capsys.readouterr().err == "rekindle: half way \\x1b[1m\nrekindle: error: no such image\n"


def test_json_has_a_level_and_a_time(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REKINDLE_LOG_FORMAT", "json")
    before = datetime.now(UTC)
    log.write("a\nb")
    log.write("WARNING: cold start")
    log.write_error("no such image", code="not-found")
    info, warning, error = lines(capsys.readouterr().err)
    assert (info["level"], info["message"]) == ("info", "a\nb")
    assert (warning["level"], warning["message"]) == ("warning", "cold start")
    assert (error["level"], error["message"], error["code"]) == ("error", "no such image", "not-found")
    told = datetime.fromisoformat(str(info["time"]))
    assert abs((told - before).total_seconds()) < 60


def test_every_line_of_a_command_is_an_object(tmp_path: Path) -> None:
    rekindle = Rekindle(tmp_path / "home", {"REKINDLE_LOG_FORMAT": "json"})
    sample = make_sample(tmp_path / "from")
    sample.layout.publish(sample.layout, sample.root, "1")
    done = rekindle("copy", f"oci:{tmp_path}/from:1", f"oci:{tmp_path}/to:1")
    assert done.status == 0
    assert {line["level"] for line in lines(done.stderr)} == {"info"}

    done = rekindle("inspect", "none")
    assert done.status == 12
    (error,) = lines(done.stderr)
    assert (error["code"], error["exit_status"]) == ("not-found", 12)
