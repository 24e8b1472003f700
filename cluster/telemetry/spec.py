"""What the processes of a gang are told about telemetry."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TelemetrySpec:
    """Where metrics and spans go. The default has a port to be scraped in each process, and no spans."""

    traces_endpoint: str | None = None
    """URL that takes OTLP traces over HTTP; None: no span is made."""
    metrics_endpoint: str | None = None
    """URL that takes OTLP metrics over HTTP; None: they can only be scraped."""
    scraped: bool = True
    """Whether each process opens a port for Prometheus."""
    scrape_from_port: int = 0
    """The first of the ports that processes of a machine take for it, each one that is free; 0: any."""
    trace_ratio: float = 1.0
    """Of the requests that come without a decision of their own (`traceparent`), so many are traced."""
    step_ratio: float = 0.01
    """Of the steps, so many are traced, where anything is."""
    content: bool = False
    """Whether spans hold messages and answers."""
    vllm_names: bool = False
    """Whether scrapes show the metrics that have a name in vLLM under that name too."""
    model: str = "divisi"
    """The model's name in the API."""
