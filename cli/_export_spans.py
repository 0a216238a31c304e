# SPDX-License-Identifier: Apache-2.0
"""Export a report, which standard input gives, as spans of OpenTelemetry: one of the command, one per phase.

All settings are the standard variables of OpenTelemetry. The command's span belongs to the trace that
$TRACEPARENT names, if there is one.
"""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rekindle import __version__, log

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

_NICE = 10
_PROTOCOLS = {
    "http/protobuf": "opentelemetry.exporter.otlp.proto.http.trace_exporter",
    "grpc": "opentelemetry.exporter.otlp.proto.grpc.trace_exporter",
}


def main() -> int:
    """Export the spans and return the exit status; 1 if that could not be done, with a warning."""
    os.nice(_NICE)
    given = json.load(sys.stdin)
    try:
        _export(given["report"], given["at"], _exporter())
    except ImportError as error:
        log.write(
            f"WARNING: spans are not exported: {error}; install rekindle-llm[traces] "
            "or unset OTEL_EXPORTER_OTLP_ENDPOINT"
        )
        return 1
    except Exception as error:  # of a library, with settings of others
        log.write(f"WARNING: spans are not exported: {error}")
        return 1
    return 0


def _exporter() -> "SpanExporter":
    import importlib

    names = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
    protocol = next((os.environ[name] for name in names if os.environ.get(name)), "http/protobuf")
    if protocol not in _PROTOCOLS:
        raise ValueError(f"unknown OTEL_EXPORTER_OTLP_PROTOCOL '{protocol}': http/protobuf or grpc")
    exporter: SpanExporter = importlib.import_module(_PROTOCOLS[protocol]).OTLPSpanExporter()
    return exporter


def _export(report: Mapping[str, Any], at: float, exporter: "SpanExporter") -> None:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.trace import Status, StatusCode, set_span_in_context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    found: dict[str, Any] = {"service.version": __version__}
    if not os.environ.get("OTEL_SERVICE_NAME") and "service.name=" not in os.environ.get(
        "OTEL_RESOURCE_ATTRIBUTES", ""
    ):
        found["service.name"] = "rekindle"
    provider = TracerProvider(resource=Resource.create(found), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    tracer = provider.get_tracer("rekindle", __version__)

    def moment(seconds: float) -> int:
        return int((at - report["seconds"] + seconds) * 1e9)

    parent = TraceContextTextMapPropagator().extract(
        {name.lower(): os.environ[name] for name in ("TRACEPARENT", "TRACESTATE") if name in os.environ}
    )
    whole = tracer.start_span(
        f"rekindle {report['verb']}", parent, start_time=moment(0.0), attributes=attributes(report)
    )
    for reason in report["reasons"]:
        facts = {f"rekindle.reason.{name}": reason[name] for name in ("rung", "code", "field", "hard")}
        whole.add_event("reason", facts, timestamp=moment(report["seconds"]))
    for phase in report["phases"]:
        span = tracer.start_span(
            phase["name"], set_span_in_context(whole), start_time=moment(phase["at_seconds"])
        )
        span.end(moment(phase["at_seconds"] + phase["seconds"]))
    if error := report["error"]:
        whole.set_status(Status(StatusCode.ERROR, error["message"]))
        whole.set_attribute("error.type", error["code"])
    whole.end(moment(report["seconds"]))
    provider.shutdown()


def attributes(report: Mapping[str, Any]) -> dict[str, str | bool | int | float | Sequence[str]]:
    """Return the attributes of the command's span."""
    image, memory, cache = report["image"], report["memory"] or {}, report["cache"] or {}
    found = {
        "outcome": report["outcome"],
        "asked": report["asked"],
        "image.reference": image.get("reference"),
        "image.digest": image.get("digest"),
        "verified": report["trust"]["verified"],
        "signed_by": report["trust"]["by"],
        "replica": report["replica"],
        "endpoint": report["endpoint"],
        "first_token_seconds": report["first_token_seconds"],
        "memory.mode": memory.get("mode"),
        "memory.own_bytes": memory.get("own_bytes"),
        "kernel_cache": cache.get("verdict"),
        **{f"bytes.{kind}": number for kind, number in report["bytes"].items()},
    }
    return {f"rekindle.{name}": value for name, value in found.items() if value is not None}


if __name__ == "__main__":
    sys.exit(main())
