# SPDX-License-Identifier: Apache-2.0
"""A report accounts for every second and keeps its form."""

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cli._report import console, write
from rekindle.proc import process_age
from rekindle.report import SCHEMA, Failure, ImageName, Outcome, Reason, Report, Rung

KEYS = [
    *("schema", "verb", "outcome", "asked", "image", "trust", "reasons", "phases", "seconds"),
    *("unaccounted_seconds", "first_token_seconds", "bytes", "oracle", "cache", "endpoint", "pid"),
]
REASON = Reason(rung=Rung.PROCESS, code="kernel", field="kernel", recorded="6.8", here="6.9", hard=False)


def test_the_form_is_the_documented_one() -> None:
    document = Report(verb="restore").to_json()
    assert list(document)[: len(KEYS)] == KEYS
    assert document["schema"] == SCHEMA == "rekindle.report/1"
    assert document["trust"] == {"verified": False, "by": None}
    assert document["outcome"] == "failed"
    assert document["asked"] == "process"
    assert (
        document["first_token_seconds"]
        is document["endpoint"]
        is document["pid"]
        is document["error"]
        is None
    )
    assert (document["image"], document["reasons"], document["bytes"], document["oracle"]) == ({}, [], {}, {})


def test_a_report_is_json() -> None:
    report = Report(verb="restore", outcome=Outcome.RESTORED, reasons=[REASON], pid=5)
    report.image = ImageName(reference="x", digest="sha256:0")
    report.bytes.fetched = 7
    report.first_token_seconds = 0.1234567891
    document = json.loads(json.dumps(report.to_json()))
    assert document["outcome"] == "restored"
    assert document["image"] == {"reference": "x", "digest": "sha256:0"}
    assert document["bytes"] == {"fetched": 7}
    assert document["first_token_seconds"] == 0.123457
    assert document["reasons"] == [
        {
            "rung": "process",
            "code": "kernel",
            "field": "kernel",
            "recorded": "6.8",
            "here": "6.9",
            "hard": False,
            "advice": "",
            "by_policy": False,
        }
    ]
    assert document["peak_rss_bytes"] > 1 << 20


def test_a_reason_can_be_read() -> None:
    assert str(REASON) == "kernel: kernel was 6.8, is 6.9"


def test_phases_and_the_rest_are_all_the_time() -> None:
    report = Report(verb="restore", began=time.monotonic() - 2)
    with report.phase("one"):
        time.sleep(0.02)
    time.sleep(0.03)
    with report.phase("two"):
        time.sleep(0.02)
    document = report.to_json()
    assert [phase["name"] for phase in document["phases"]] == ["start", "one", "two"]
    total = sum(phase["seconds"] for phase in document["phases"]) + document["unaccounted_seconds"]
    assert total == pytest.approx(document["seconds"], abs=1e-5)
    assert document["phases"][0]["seconds"] == pytest.approx(2, abs=0.5)
    assert all(phase["seconds"] >= 0.02 for phase in document["phases"])
    assert document["unaccounted_seconds"] >= 0.03


def test_a_phase_that_fails_is_timed() -> None:
    report = Report(verb="restore")
    with contextlib.suppress(ZeroDivisionError), report.phase("broken"):
        time.sleep(0.01)
        raise ZeroDivisionError
    assert report.phases[-1].name == "broken"
    assert report.phases[-1].seconds >= 0.01


def test_time_counts_from_the_start_of_the_process() -> None:
    report = Report(verb="restore")
    age = process_age()
    assert report.phases[0].name == "start"
    assert report.phases[0].seconds == pytest.approx(age, abs=0.5)
    assert age > 0.05
    time.sleep(0.05)
    assert process_age() - age == pytest.approx(0.05, abs=0.05)


def test_people_are_told_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report(verb="restore", tell=console(quiet=False))
    with report.phase("unpack"):
        report.say("half way")
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert lines[0] == "rekindle: half way"
    assert lines[1].startswith("rekindle: unpack 0.")


def test_a_quiet_report_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report(verb="restore", tell=console(quiet=True))
    with report.phase("unpack"):
        report.say("half way")
    assert capsys.readouterr() == ("", "")


def test_a_report_goes_where_it_was_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = Report(verb="restore")
    write(report, tmp_path / "report.json", to_stdout=True)
    printed = capsys.readouterr().out
    assert printed.endswith("}\n")
    assert json.loads(printed) == json.loads((tmp_path / "report.json").read_bytes())
    write(report, None, to_stdout=False)
    assert capsys.readouterr().out == ""


def test_text_that_is_no_text_can_be_reported(tmp_path: Path) -> None:
    report = Report(verb="restore", error=Failure(code="bug", message="\udcff \0 \u2028"))
    write(report, tmp_path / "report.json", to_stdout=False)
    assert json.loads((tmp_path / "report.json").read_bytes())["error"]["message"] == "\udcff \0 \u2028"


def test_a_large_parent_does_not_count() -> None:
    program = "from rekindle.proc import peak_rss_bytes; print(peak_rss_bytes())"
    large = b"x" * (300 << 20)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, timeout=60)
    assert 1 << 20 < int(done.stdout) < len(large) // 2
