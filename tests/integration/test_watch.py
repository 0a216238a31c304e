# SPDX-License-Identifier: Apache-2.0
"""Metrics, spans and JSON logs of real restores, wakes and failures."""

import json
import os
import signal
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import KeyPair, Rekindle, free_port, listening, wait_for, workhorse
from tests.servers.collector import Collector, attributes

pytestmark = pytest.mark.criu


def metrics(rekindle: Rekindle) -> dict[tuple[str, ...], float]:
    """Return each value by the metric's name and the sorted values of its labels."""
    done = rekindle("metrics")
    assert done.status == 0, done.stderr
    return {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(done.stdout)
        for sample in family.samples
    }


def test_what_happens_to_servers_is_counted(rekindle: Rekindle, horse_port: int, key_pair: KeyPair) -> None:
    port = free_port()
    flags = ("--detach", "--name", "web", "--publish", str(port))
    assert rekindle("restore", "horse", *flags).status == 0
    wait_for(lambda: metrics(rekindle)["rekindle_restores_total", "process", "restored"] == 1, 10)
    found = metrics(rekindle)
    assert found["rekindle_restores_total", "process", "restored"] == 1
    assert found["rekindle_first_token_seconds_count", "restored"] == 1
    assert found["rekindle_phase_seconds_count", "oracle", "restore"] == 1
    assert found["rekindle_phase_seconds_count", "decide", "restore"] == 1
    assert found["rekindle_replicas", "ready"] == 1
    assert found["rekindle_replica_ready", "horse", "web"] == 1
    assert 0 < found["rekindle_replica_memory_bytes", "horse", "own", "web"] < 100e6
    assert found["rekindle_replica_memory_bytes", "horse", "shared", "web"] > 0
    assert found["rekindle_kept", "dump"] == 1
    assert found["rekindle_kept_bytes", "image"] > 0

    assert rekindle("hibernate", "web").status == 0
    assert rekindle("wake", "web").status == 0
    wait_for(lambda: metrics(rekindle)["rekindle_wakes_total", "restored"] == 1, 10)
    found = metrics(rekindle)
    assert found["rekindle_wakes_total", "restored"] == 1
    assert found["rekindle_commands_total", "hibernate", "saved"] == 1
    assert found["rekindle_restores_total", "process", "restored"] == 2
    assert found["rekindle_pause_seconds_count",] == 1

    (web,) = rekindle("ps", "--json").json["replicas"]
    os.kill(web["serving"]["pid"], signal.SIGKILL)
    wait_for(lambda: not listening(port), 10)
    found = metrics(rekindle)
    assert (found["rekindle_replicas", "ready"], found["rekindle_replicas", "killed"]) == (0, 1)
    assert found["rekindle_restores_total", "process", "restored"] == 2

    refused = rekindle("restore", "horse", *key_pair.verify)
    assert refused.status == 22, refused.stderr
    assert metrics(rekindle)["rekindle_verification_failures_total", "restore", "trust"] == 1


def test_a_restore_is_exported_when_its_server_is_ready(
    rekindle: Rekindle, horse_port: int, tmp_path: Path
) -> None:
    port = free_port()
    with Collector() as collector:
        log = tmp_path / "log"
        process = rekindle.spawn(
            *("restore", "horse", "--publish", str(port), "--ready-file", str(tmp_path / "ready")),
            log=log,
            env={
                "OTEL_EXPORTER_OTLP_ENDPOINT": collector.endpoint,
                "REKINDLE_LOG_FORMAT": "json",
                "TRACEPARENT": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            },
        )
        wait_for(lambda: bool(collector.spans), 30)
        assert (tmp_path / "ready").exists()
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 7, log.read_text()
    spans = {span.name: span for span in collector.spans}
    whole = spans["rekindle restore"]
    assert {"start", "decide", "restore", "oracle"} <= set(spans)
    facts = attributes(whole)
    assert whole.trace_id.hex() == "0af7651916cd43dd8448eb211c80319c"
    assert not [event for event in whole.events if "TRACEPARENT" in str(event)]
    assert facts["rekindle.outcome"] == "restored", facts
    assert facts["rekindle.image.reference"] == "horse"
    assert facts["rekindle.verified"] is True
    assert 0 < facts["rekindle.first_token_seconds"] < 60
    by_start = sorted(spans.values(), key=lambda span: span.start_time_unix_nano)
    names = [span.name for span in by_start if span is not whole]
    assert names.index("decide") < names.index("restore") < names.index("oracle")

    lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    assert any(line["message"].startswith("ready (restored)") for line in lines)
    assert not [line for line in log.read_text().splitlines() if line.startswith("rekindle: ")]


def test_a_collector_that_stalls_delays_neither_the_start_nor_the_end_for_long(
    rekindle: Rekindle, horse_port: int, tmp_path: Path
) -> None:
    port, ready = free_port(), tmp_path / "ready"
    with Collector(stalls=300) as collector:
        process = rekindle.spawn(
            *("restore", "horse", "--publish", str(port), "--ready-file", str(ready)),
            log=tmp_path / "log",
            env={"OTEL_EXPORTER_OTLP_ENDPOINT": collector.endpoint},
        )
        wait_for(ready.exists, 30)
        wait_for(lambda: bool(collector.requests), 30)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 7


def test_a_cold_start_is_counted_too(rekindle: Rekindle, tmp_path: Path) -> None:
    port, ready = free_port(), tmp_path / "ready"
    process = rekindle.spawn(
        *("restore", "none", "--ready-url", f"http://127.0.0.1:{port}/health", "--ready-file", str(ready)),
        *("--", *workhorse(port)),
        log=tmp_path / "log",
    )
    wait_for(ready.exists, 30)
    wait_for(lambda: metrics(rekindle)["rekindle_restores_total", "cold", "process"] == 1, 10)
    assert metrics(rekindle)["rekindle_reasons_total", "not-found", "process", "true"] == 1
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 7


def test_a_home_that_cannot_be_written_changes_nothing(
    rekindle: Rekindle, horse_port: int, tmp_path: Path
) -> None:
    (rekindle.home / "history").write_text("in the way")
    port, ready = free_port(), tmp_path / "ready"
    process = rekindle.spawn(
        *("restore", "horse", "--publish", str(port), "--ready-file", str(ready)), log=tmp_path / "log"
    )
    wait_for(ready.exists, 30)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 7
    assert "Traceback" not in (tmp_path / "log").read_text()
