"""Answers that change their worker: counted, and noted in their spans."""

from __future__ import annotations

from opentelemetry import trace

from divisi.cluster.telemetry.conventions import RECOMPUTED_TOKENS, RESENT, RESUMED
from divisi.cluster.telemetry.process import Telemetry
from divisi.cluster.telemetry.spec import TelemetrySpec


class MovedAnswers:
    """Of one ingress. What is noted goes to the span of the running task."""

    def __init__(self, telemetry: Telemetry | None = None) -> None:
        """Without `telemetry` nobody sees the counts."""
        meter = (telemetry or Telemetry(TelemetrySpec(scraped=False), "ingress")).metrics.meter
        self._resent = meter.create_counter(
            "divisi_resent_requests", "", "Requests that a worker refused before it began, and that went to another."
        )
        self._resumed = meter.create_counter(
            "divisi_resumed_requests", "", "Times that an answer went on with another worker."
        )
        self._recomputed = meter.create_counter(
            "divisi_recomputed_tokens", "", "Tokens of prompts and answers that were computed again for that."
        )
        for counter in (self._resent, self._resumed, self._recomputed):
            counter.add(0)

    def resent(self) -> None:
        """A worker refused a request, which goes to another."""
        trace.get_current_span().add_event(RESENT)
        self._resent.add(1)

    def resumed(self, tokens: int) -> None:
        """A worker was lost, or leaves; another computes so many tokens again and goes on."""
        trace.get_current_span().add_event(RESUMED, {RECOMPUTED_TOKENS: tokens})
        self._resumed.add(1)
        self._recomputed.add(tokens)
