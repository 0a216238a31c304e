# SPDX-License-Identifier: Apache-2.0
"""Metrics are what the home holds, in Prometheus' format, and Grafana's dashboard asks for nothing else."""

import contextlib
import json
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from rekindle import history
from rekindle.errors import TrustError
from rekindle.home import Home
from rekindle.replicas import register
from rekindle.report import ByteCounts, ImageName, Outcome, Pause, Reason, Report, Rung
from tests.conftest import ROOT, Rekindle, free_port, wait_for

DASHBOARD = ROOT / "deploy" / "grafana" / "rekindle.json"


@pytest.fixture
def rekindle(tmp_path: Path) -> Rekindle:
    return Rekindle(tmp_path / "home")


def fill(home: Home) -> None:
    """Make something of everything that is counted."""
    reason = Reason(rung=Rung.PROCESS, code="kernel", field="kernel", recorded="1", here="2", hard=True)
    made = Report(verb="restore", outcome=Outcome.RESTORED, first_token_seconds=0.4, reasons=[reason])
    made.image, made.bytes = ImageName(reference="tiny"), ByteCounts(fetched=1000)
    with made.phase("decide"):
        pass
    document = made.to_json()
    cache = {"verdict": "hit", "used": 6, "made": 0}
    history.add(home, {**document, "outcome": "cache", "cache": cache}, at=1.0)
    history.add(home, document, at=1.0, wakes=True)
    refused = Report(verb="restore")
    refused.fail(TrustError("no signature"))
    history.add(home, refused.to_json(), at=1.0)
    history.add(
        home, Report(verb="snapshot", outcome=Outcome.SAVED, pause=Pause(seconds=1.5)).to_json(), at=1.0
    )


def samples(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(text: str, name: str, **labels: str) -> float:
    return samples(text)[name, frozenset(labels.items())]


def test_an_empty_home_has_metrics(rekindle: Rekindle) -> None:
    done = rekindle("metrics")
    assert done.status == 0, done.stderr
    assert value(done.stdout, "rekindle_replicas", state="ready") == 0
    assert value(done.stdout, "rekindle_kept", kind="image") == 0
    assert value(done.stdout, "rekindle_counted_since_seconds") == 0


def test_what_never_happened_is_zero_since_prometheus_sees_increases_only(rekindle: Rekindle) -> None:
    text = rekindle("metrics").stdout
    assert value(text, "rekindle_restores_total", outcome="failed", asked="process") == 0
    assert value(text, "rekindle_verification_failures_total", verb="pull", code="trust") == 0
    assert value(text, "rekindle_wakes_total", outcome="restored") == 0


def test_what_is_counted_is_told(rekindle: Rekindle) -> None:
    fill(Home(rekindle.home))
    text = rekindle("metrics").stdout
    assert value(text, "rekindle_restores_total", outcome="restored", asked="process") == 1
    assert value(text, "rekindle_restores_total", outcome="cache", asked="process") == 1
    assert value(text, "rekindle_restores_total", outcome="failed", asked="process") == 1
    assert value(text, "rekindle_reasons_total", rung="process", code="kernel", hard="true") == 2
    assert value(text, "rekindle_verification_failures_total", verb="restore", code="trust") == 1
    assert value(text, "rekindle_wakes_total", outcome="restored") == 1
    assert value(text, "rekindle_bytes_total", verb="restore", kind="fetched") == 2000
    assert value(text, "rekindle_kernel_cache_starts_total", verdict="hit") == 1
    assert value(text, "rekindle_kernel_cache_entries_total", use="used") == 6
    assert value(text, "rekindle_first_token_seconds_bucket", outcome="restored", le="0.25") == 0
    assert value(text, "rekindle_first_token_seconds_bucket", outcome="restored", le="0.5") == 1
    assert value(text, "rekindle_first_token_seconds_bucket", outcome="restored", le="+Inf") == 1
    assert value(text, "rekindle_first_token_seconds_sum", outcome="restored") == 0.4
    assert value(text, "rekindle_phase_seconds_count", verb="restore", phase="decide") == 2
    assert value(text, "rekindle_pause_seconds_sum") == 1.5


def test_everything_that_is_counted_and_timed_is_told(rekindle: Rekindle) -> None:
    fill(Home(rekindle.home))
    families = {family.name for family in text_string_to_metric_families(rekindle("metrics").stdout)}
    assert {f"rekindle_{name}" for name in (*history.COUNTED, *history.TIMED)} <= families


def test_one_that_is_killed_is_counted_as_such(rekindle: Rekindle) -> None:
    home = Home(rekindle.home)
    with register(home, "alive", "tiny"):
        text = rekindle("metrics").stdout
        assert value(text, "rekindle_replicas", state="starting") == 1
        assert value(text, "rekindle_replica_ready", replica="alive", image="tiny") == 0
        assert value(text, "rekindle_replica_memory_bytes", replica="alive", image="tiny", kind="own") > 0
        program = (
            "import os, sys\nfrom rekindle.home import Home\nfrom rekindle.replicas import register\n"
            "from pathlib import Path\n"
            "register(Home(Path(sys.argv[1])), 'dead', 'tiny')\nos.kill(os.getpid(), 9)"
        )
        subprocess.run([sys.executable, "-c", program, str(rekindle.home)], cwd=ROOT, check=False)
        text = rekindle("metrics").stdout
    assert value(text, "rekindle_replicas", state="killed") == 1
    assert not [key for key in samples(text) if ("replica", "dead") in key[1]]


def test_memory_of_another_namespace_is_left_out(rekindle: Rekindle) -> None:
    """There, the PID means another process."""
    with register(Home(rekindle.home), "there", "tiny") as registration:
        there = registration.status.serving
        registration.update(serving=msgspec.structs.replace(there, namespace="pid:[1]"))
        text = rekindle("metrics").stdout
        assert value(text, "rekindle_replica_ready", replica="there", image="tiny") == 0
        assert not [key for key in samples(text) if key[0] == "rekindle_replica_memory_bytes"]
        (listed,) = rekindle("ps", "--json").json["replicas"]
        assert listed["memory"] == {"own_bytes": 0, "shared_bytes": 0}


def test_a_file_is_replaced_whole_for_its_reader(rekindle: Rekindle, tmp_path: Path) -> None:
    file = tmp_path / "collector" / "rekindle.prom"
    assert rekindle("metrics", "--file", str(file)).status == 2, "there is no such directory"
    file.parent.mkdir()
    assert rekindle("metrics", "--file", str(file)).status == 0
    assert value(file.read_text(), "rekindle_replicas", state="ready") == 0
    assert file.stat().st_mode & 0o777 == 0o644
    assert list(file.parent.iterdir()) == [file]
    before = file.stat().st_ino
    repeated = rekindle.spawn("metrics", "--file", str(file), "--every", "0.05", log=tmp_path / "log")
    wait_for(lambda: file.stat().st_ino != before, 10)
    repeated.send_signal(signal.SIGTERM)
    assert repeated.wait(10) == 0


@contextlib.contextmanager
def served(rekindle: Rekindle, tmp_path: Path, address: str) -> Iterator[None]:
    process = rekindle.spawn("metrics", "--listen", address, log=tmp_path / "log")
    try:
        wait_for(lambda: "metrics on http" in (tmp_path / "log").read_text(), 10)
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0


def test_they_are_served_as_they_are_now(rekindle: Rekindle, tmp_path: Path) -> None:
    port = free_port()
    with served(rekindle, tmp_path, str(port)):
        url = f"http://127.0.0.1:{port}/metrics"

        def read() -> Any:
            with urllib.request.urlopen(url, timeout=10) as response:
                assert response.headers["Content-Type"].startswith("text/plain; version=")
                return response.read().decode()

        assert value(read(), "rekindle_counted_since_seconds") == 0
        fill(Home(rekindle.home))
        assert value(read(), "rekindle_wakes_total", outcome="restored") == 1
        assert rekindle("metrics", "--listen", str(port)).status == 13


def test_without_the_library_it_is_named(rekindle: Rekindle, tmp_path: Path) -> None:
    (tmp_path / "prometheus_client.py").write_text("raise ImportError('no prometheus_client')")
    done = rekindle("metrics", env={"PYTHONPATH": str(tmp_path)})
    assert done.status == 10
    assert "rekindle-llm[metrics]" in done.stderr


NAME = re.compile(r"\brekindle_[a-z_]+\b")
SELECTOR = re.compile(r"(rekindle_[a-z_]+)\{([^}]*)\}")
BY = re.compile(r"\bby \(([^)]*)\)")
VARIABLES = {"job", "instance", "le"}


def expressions(found: Any) -> Iterator[str]:
    match found:
        case {"expr": str(text)}:
            yield text
        case {"query": str(text)} | {"query": {"query": str(text)}} if "rekindle_" in text:
            yield text
    children = found.values() if isinstance(found, dict) else found if isinstance(found, list) else ()
    for child in children:
        yield from expressions(child)


def test_grafana_asks_for_metrics_and_labels_that_exist(rekindle: Rekindle) -> None:
    home = Home(rekindle.home)
    fill(home)
    with register(home, "alive", "tiny"):
        found = samples(rekindle("metrics").stdout)
    names = {name for name, _ in found}
    labels: dict[str, set[str]] = {}
    for name, pairs in found:
        labels.setdefault(name, set()).update(label for label, _ in pairs)
    asked = list(expressions(json.loads(DASHBOARD.read_text())))
    assert len(asked) > 10
    for text in asked:
        used = set(NAME.findall(text)) - {"rekindle_dashboard"}
        assert used <= names, f"{text}: {used - names}"
        for name, inner in SELECTOR.findall(text):
            assert set(re.findall(r"(\w+)\s*[=!]", inner)) <= labels[name] | VARIABLES, text
        for group in BY.findall(text):
            known = set().union(*(labels[name] for name in used)) | VARIABLES
            assert {label.strip() for label in group.split(",")} <= known, text


def test_grafana_shows_everything_that_exists(rekindle: Rekindle) -> None:
    """But for what a person would not look at."""
    home = Home(rekindle.home)
    fill(home)
    with register(home, "alive", "tiny"):
        text = rekindle("metrics").stdout
    families = {family.name for family in text_string_to_metric_families(text)}
    shown = " ".join(expressions(json.loads(DASHBOARD.read_text())))
    left_out = {
        name for name in families if not re.search(rf"\b{name}(_total|_bucket|_sum|_count)?\b", shown)
    }
    assert left_out == {"rekindle_build_info", "rekindle_counted_since_seconds"}
