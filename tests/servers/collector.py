# SPDX-License-Identifier: Apache-2.0
"""A collector of OpenTelemetry: takes spans by OTLP over HTTP, and refuses what is not well-formed."""

import gzip
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)


class Collector:
    """Listens on loopback within a context. `status` is its answer; with `stalls`, it answers late."""

    def __init__(self, *, status: int = 200, stalls: float = 0.0) -> None:
        self.requests: list[ExportTraceServiceRequest] = []
        self.headers: list[dict[str, str]] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                content = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    content = gzip.decompress(content)
                request = ExportTraceServiceRequest()
                request.ParseFromString(content)
                is_traces = self.path == "/v1/traces"
                is_protobuf = self.headers["Content-Type"] == "application/x-protobuf"
                collector.headers.append(dict(self.headers))
                collector.requests.append(request)
                time.sleep(stalls)
                self.send_response(status if is_traces and is_protobuf else 400)
                self.send_header("Content-Type", "application/x-protobuf")
                self.end_headers()
                self.wfile.write(ExportTraceServiceResponse().SerializeToString())

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "Collector":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def spans(self) -> list[Any]:
        return [
            span
            for request in self.requests
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]

    @property
    def resource(self) -> dict[str, Any]:
        (found,) = self.requests[0].resource_spans
        return attributes(found.resource)


def attributes(of: Any) -> dict[str, Any]:
    """Return the attributes of a span, a resource or an event."""
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in of.attributes}
