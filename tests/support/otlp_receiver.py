"""A collector for tests: takes OTLP over HTTP and keeps the spans, and the names of the metrics."""

from __future__ import annotations

import gzip
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


@dataclass(frozen=True)
class Got:
    """A span as it came."""

    process: str
    """`service.instance.id`, a role and a process id."""
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    start_ns: int
    end_ns: int
    attributes: dict[str, Any]
    events: tuple[str, ...]
    links: tuple[tuple[str, str], ...]
    """Trace and span ids."""
    failed: bool


@dataclass
class Received:
    """All that has come."""

    url: str
    spans: list[Got] = field(default_factory=list)
    metrics: set[str] = field(default_factory=set)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def traces(self) -> dict[str, list[Got]]:
        """Spans by trace."""
        found: dict[str, list[Got]] = defaultdict(list)
        for span in list(self.spans):
            found[span.trace_id].append(span)
        return found

    def wait_for(self, ready: Any, timeout_s: float) -> bool:
        """Wait until `ready(self)`; False when that takes longer."""
        with self.changed:
            return self.changed.wait_for(lambda: ready(self), timeout_s)


@contextmanager
def otlp_receiver() -> Iterator[Received]:
    """A collector on a free port."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            with received.changed:
                if self.path == "/v1/traces":
                    received.spans += _spans(ExportTraceServiceRequest.FromString(body))
                elif self.path == "/v1/metrics":
                    received.metrics |= _names(ExportMetricsServiceRequest.FromString(body))
                received.changed.notify_all()
            self.send_response(200)
            self.send_header("content-type", "application/x-protobuf")
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    received = Received(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield received
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


def _spans(request: ExportTraceServiceRequest) -> list[Got]:
    found = []
    for of_resource in request.resource_spans:
        resource = {entry.key: _value(entry.value) for entry in of_resource.resource.attributes}
        for of_scope in of_resource.scope_spans:
            for span in of_scope.spans:
                found.append(Got(
                    process=str(resource.get("service.instance.id")),
                    name=span.name,
                    trace_id=span.trace_id.hex(),
                    span_id=span.span_id.hex(),
                    parent_id=span.parent_span_id.hex(),
                    start_ns=span.start_time_unix_nano,
                    end_ns=span.end_time_unix_nano,
                    attributes={entry.key: _value(entry.value) for entry in span.attributes},
                    events=tuple(event.name for event in span.events),
                    links=tuple((link.trace_id.hex(), link.span_id.hex()) for link in span.links),
                    failed=span.status.code == 2,
                ))  # fmt: skip
    return found


def _names(request: ExportMetricsServiceRequest) -> set[str]:
    return {
        metric.name
        for of_resource in request.resource_metrics
        for of_scope in of_resource.scope_metrics
        for metric in of_scope.metrics
    }


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(entry) for entry in value.array_value.values]
    return None if kind is None else getattr(value, kind)
