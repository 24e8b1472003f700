"""A process's own metrics and spans: made once, at its start, from what the gang was told."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.metrics import Observation
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import (
    MetricExporter,
    MetricExportResult,
    MetricReader,
    MetricsData,
    PeriodicExportingMetricReader,
)
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Tracer
from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server

from divisi.cluster.telemetry.batches import BatchHistogram, Produced, Producer, metrics_of
from divisi.cluster.telemetry.conventions import DIVISI, SCHEMA_URL
from divisi.cluster.telemetry.rows import StatRow
from divisi.cluster.telemetry.spec import TelemetrySpec
from divisi.cluster.telemetry.vllm_names import VllmNames

SCRAPE_PORTS = 64
"""So many ports may be tried where the first is given: processes of one machine, and former ones that still end."""
_SEND_EVERY_MS = 1000.0
_METRICS_EVERY_MS = 15_000.0
_SEND_S = 5.0
"""For a collector to take a batch, tries again included; a process that ends waits no longer for it."""
_LAST_WORDS_MS = 2000
"""For what has not been sent when a process ends."""


class _ScrapedReader(PrometheusMetricReader):
    """The SDK's, with what producers make. `_receive_metrics` is what every reader has to define."""

    def __init__(self, produced: Produced, registry: CollectorRegistry) -> None:
        super().__init__(disable_target_info=True, scope_info_enabled=False, registry=registry)
        self._produced = produced

    def _receive_metrics(self, metrics_data: MetricsData, timeout_millis: float = 10_000, **kwargs: Any) -> None:
        super()._receive_metrics(self._produced(metrics_data), timeout_millis, **kwargs)


class _SendingExporter(MetricExporter):
    """An exporter, with what producers make."""

    def __init__(self, produced: Produced, exporter: MetricExporter) -> None:
        super().__init__()
        self._produced, self._exporter = produced, exporter

    def export(self, metrics_data: MetricsData, timeout_millis: float = 10_000, **kwargs: Any) -> MetricExportResult:
        return self._exporter.export(self._produced(metrics_data), timeout_millis, **kwargs)

    def force_flush(self, timeout_millis: float = 10_000) -> bool:
        return self._exporter.force_flush(timeout_millis)

    def shutdown(self, timeout_millis: float = 30_000, **kwargs: Any) -> None:
        self._exporter.shutdown(timeout_millis, **kwargs)


class ProcessMetrics:
    """The metrics of one process, in a registry of its own."""

    def __init__(self, spec: TelemetrySpec, resource: Resource) -> None:
        self.registry = CollectorRegistry()
        self._produced = Produced()
        self._since = time.time_ns()
        readers: list[MetricReader] = [_ScrapedReader(self._produced, self.registry)]
        if spec.metrics_endpoint is not None:
            from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter  # late: 0.1 s

            sent = OTLPMetricExporter(endpoint=spec.metrics_endpoint, timeout=_SEND_S)
            exporter = _SendingExporter(self._produced, sent)
            readers.append(PeriodicExportingMetricReader(exporter, _METRICS_EVERY_MS))
        self._provider = MeterProvider(readers, resource, shutdown_on_exit=False)
        self.meter = self._provider.get_meter(DIVISI)
        # Readers pass nothing on where the SDK has no instrument, so that there has to be one.
        info = [Observation(1, {"version": version(DIVISI)})]
        self.meter.create_observable_gauge("divisi_info", [lambda _: info], "", "What runs here; always 1.")
        if spec.vllm_names:
            self.registry.register(VllmNames(self.registry, spec.model))

    def produce(self, producer: Producer) -> None:
        """Ask this for metrics at every scrape, in the scrape's thread."""
        self._produced.producers.append(producer)

    def forget(self) -> None:
        """Show nothing of what was given before, from the next scrape on."""
        self._produced.producers.clear()

    def show(self, *histograms: BatchHistogram) -> None:
        """Show these."""
        self.produce(lambda: [histogram.metric() for histogram in histograms])

    def show_rows(self, rows: Iterable[StatRow]) -> None:
        """Show what iterating over `rows` gives at each scrape."""
        self.produce(lambda: metrics_of(rows, self._since))

    def serve(self, host: str, from_port: int = 0) -> int:
        """Open a port on which a scrape finds all of it, and the process's own memory and processor time.

        It is the first free one of the SCRAPE_PORTS that begin with `from_port`; 0: any. Raises OSError if none is.
        """
        ProcessCollector(registry=self.registry)
        for port in range(from_port, from_port + SCRAPE_PORTS) if from_port else (0,):
            try:
                server, _ = start_http_server(port, host, self.registry)
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
            else:
                return int(server.server_port)
        last = from_port + SCRAPE_PORTS - 1
        raise OSError(errno.EADDRINUSE, f"no port from {from_port} to {last} is free on {host}; give another first one")

    def close(self) -> None:
        """Send what has not been sent."""
        self._provider.shutdown(timeout_millis=_LAST_WORDS_MS)


class Telemetry:
    """What a process has for telling of itself. `tracer` is None where no spans are wanted."""

    def __init__(self, spec: TelemetrySpec, role: str, host: str | None = None) -> None:
        """With `host`, an address of this machine, a port is opened there unless `spec` says otherwise.

        Raises OSError where that cannot be.
        """
        self.spec = spec
        resource = Resource({
            "service.name": DIVISI,
            "service.namespace": spec.model,
            "service.instance.id": f"{role}:{os.getpid()}",
            "process.pid": os.getpid(),
        })  # fmt: skip
        self.metrics = ProcessMetrics(spec, resource)
        self.port = self.metrics.serve(host, spec.scrape_from_port) if host is not None and spec.scraped else 0
        self.tracer: Tracer | None = None
        self._provider = None if spec.traces_endpoint is None else _span_provider(spec.traces_endpoint, resource)
        if self._provider is not None:
            self.tracer = self._provider.get_tracer(DIVISI, schema_url=SCHEMA_URL)

    def close(self) -> None:
        """Send what has not been sent; takes a few seconds at most."""
        if self._provider is not None:
            self._provider.force_flush(_LAST_WORDS_MS)
        self.metrics.close()


def _span_provider(endpoint: str, resource: Resource) -> TracerProvider:
    """Which requests and steps are traced is decided where they begin: whatever span is made here is sent."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # late: 0.1 s

    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(
        BatchSpanProcessor(
            OTLPSpanExporter(endpoint=endpoint, timeout=_SEND_S), schedule_delay_millis=_SEND_EVERY_MS
        )
    )
    return provider
