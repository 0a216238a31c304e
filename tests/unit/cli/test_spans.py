# SPDX-License-Identifier: Apache-2.0
"""Commands export their phases as spans where OpenTelemetry's variables say so, and nothing fails by it."""

import time
from pathlib import Path

import pytest

from tests.conftest import Rekindle
from tests.samples.registry import make_sample
from tests.servers.collector import Collector, attributes

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def rekindle(tmp_path: Path) -> Rekindle:
    sample = make_sample(tmp_path / "from")
    sample.layout.publish(sample.layout, sample.root, "1")
    return Rekindle(tmp_path / "home")


def copy(rekindle: Rekindle, **variables: str) -> None:
    place = rekindle.home.parent
    done = rekindle("copy", f"oci:{place}/from:1", f"oci:{place}/to:1", env=variables)
    assert done.status == 0, done.stderr
    assert "Traceback" not in done.stderr


def test_a_command_is_a_span_and_its_phases_are_below_it(rekindle: Rekindle) -> None:
    began = time.time_ns()
    with Collector() as collector:
        copy(rekindle, OTEL_EXPORTER_OTLP_ENDPOINT=collector.endpoint)
    ended = time.time_ns()
    spans = {span.name: span for span in collector.spans}
    whole = spans.pop("rekindle copy")
    assert "start" in spans
    assert len(spans) > 1
    assert not whole.parent_span_id
    for span in spans.values():
        assert (span.trace_id, span.parent_span_id) == (whole.trace_id, whole.span_id)
        assert whole.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano
        assert span.end_time_unix_nano <= whole.end_time_unix_nano + 1000
    assert began - 50e6 < whole.start_time_unix_nano < whole.end_time_unix_nano < ended
    facts = attributes(whole)
    assert facts["rekindle.outcome"] == "saved"
    assert facts["rekindle.image.digest"].startswith("sha256:")
    assert collector.resource["service.name"] == "rekindle"
    assert len(collector.requests) == 1


def test_a_failure_is_told(rekindle: Rekindle) -> None:
    with Collector() as collector:
        variables = {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"{collector.endpoint}/v1/traces"}
        assert rekindle("copy", f"oci:{rekindle.home.parent}/from:2", "x", env=variables).status == 12
    (whole,) = [span for span in collector.spans if span.name == "rekindle copy"]
    assert whole.status.code == whole.status.STATUS_CODE_ERROR
    assert attributes(whole)["error.type"] == "not-found"


def test_it_belongs_to_the_trace_of_who_has_called(rekindle: Rekindle) -> None:
    with Collector() as collector:
        copy(rekindle, OTEL_EXPORTER_OTLP_ENDPOINT=collector.endpoint, TRACEPARENT=PARENT)
    (whole,) = [span for span in collector.spans if span.name == "rekindle copy"]
    assert [whole.trace_id.hex(), whole.parent_span_id.hex()] == PARENT.split("-")[1:3]


def test_the_other_variables_count_as_well(rekindle: Rekindle) -> None:
    with Collector() as collector:
        copy(
            rekindle,
            OTEL_EXPORTER_OTLP_ENDPOINT=collector.endpoint,
            OTEL_EXPORTER_OTLP_HEADERS="x-tenant=blue",
            OTEL_EXPORTER_OTLP_COMPRESSION="gzip",
            OTEL_SERVICE_NAME="chat",
            OTEL_RESOURCE_ATTRIBUTES="k8s.pod.name=chat-1",
        )
    assert collector.resource["service.name"] == "chat"
    assert collector.resource["k8s.pod.name"] == "chat-1"
    assert {name.lower(): value for name, value in collector.headers[0].items()}["x-tenant"] == "blue"


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"OTEL_SDK_DISABLED": "true"},
        {"OTEL_TRACES_EXPORTER": "none"},
        {"OTEL_TRACES_SAMPLER": "always_off"},
    ],
)
def test_nothing_is_sent_unless_it_is_asked_for(rekindle: Rekindle, variables: dict[str, str]) -> None:
    with Collector() as collector:
        asked = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.endpoint} if variables else {}
        copy(rekindle, **asked, **variables)
        assert not collector.requests


@pytest.mark.parametrize("status", [400, 503])
def test_a_collector_that_refuses_fails_nothing(rekindle: Rekindle, status: int) -> None:
    with Collector(status=status) as collector:
        copy(rekindle, OTEL_EXPORTER_OTLP_ENDPOINT=collector.endpoint, OTEL_EXPORTER_OTLP_TIMEOUT="1")
        assert collector.requests


def test_no_collector_fails_nothing(rekindle: Rekindle) -> None:
    copy(rekindle, OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:9", OTEL_EXPORTER_OTLP_TIMEOUT="1")
    copy(rekindle, OTEL_EXPORTER_OTLP_ENDPOINT="nonsense")
    copy(rekindle, OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:9", OTEL_EXPORTER_OTLP_PROTOCOL="pigeon")


def test_without_the_library_it_is_named_once(rekindle: Rekindle, tmp_path: Path) -> None:
    (tmp_path / "opentelemetry.py").write_text("raise ImportError('no opentelemetry')")
    place = rekindle.home.parent
    variables = {"PYTHONPATH": str(tmp_path), "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}
    done = rekindle("copy", f"oci:{place}/from:1", f"oci:{place}/to:1", env=variables)
    assert done.status == 0
    assert done.stderr.count("rekindle-llm[traces]") == 1
