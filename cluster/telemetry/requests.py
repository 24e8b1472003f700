"""A worker's view of its requests: how long they wait and prefill, and the spans of those that are traced.

A request costs something when it comes, when its prefill begins and ends, and when it ends; a token nothing.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from time import perf_counter

from opentelemetry.trace import SpanContext, Status, StatusCode, Tracer

from divisi.cluster.request import Request, TokenEvent
from divisi.cluster.telemetry.batches import BatchHistogram
from divisi.cluster.telemetry.context import below, parse
from divisi.cluster.telemetry.conventions import DECODE, PREFILL, QUEUE, REQUEST_ID, SLICE
from divisi.cluster.telemetry.slices import SLICES, Slice

WAIT_BOUNDS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0,
)  # fmt: skip
_FAILED = frozenset({"error", "rejected", "lost"})


@dataclass(slots=True)
class _Times:
    """Instants of `perf_counter`."""

    slice: Slice
    span: SpanContext | None
    arrived: float
    began: float | None = None
    answered: float | None = None


class RequestTimes:
    """Belongs to the step loop's thread."""

    def __init__(self, tracer: Tracer | None) -> None:
        self._tracer = tracer
        self._open: dict[str, _Times] = {}
        self.queue = BatchHistogram(
            "divisi_queue", "From a request's arrival at its worker to its first step.", WAIT_BOUNDS, "slice", SLICES
        )
        self.prefill = BatchHistogram(
            "divisi_prefill", "From a request's first step to its first token.", WAIT_BOUNDS, "slice", SLICES
        )

    def submitted(self, request: Request, arrived: float) -> None:
        """The engine has taken a request."""
        span = parse(request.trace) if request.trace and self._tracer is not None else None
        self._open[request.request_id] = _Times(request.slice, span, arrived)

    def span_of(self, request_id: str) -> SpanContext | None:
        """The root span of a request that is traced."""
        times = self._open.get(request_id)
        return None if times is None else times.span

    def began(self, request_id: str) -> None:
        """A step begins that has a part of its prompt."""
        times = self._open.get(request_id)
        if times is not None and times.began is None:
            times.began = perf_counter()
            self.queue.of(times.slice).observe(times.began - times.arrived)

    def answered(self, request_id: str) -> None:
        """A step has ended that had the last part of its prompt."""
        times = self._open.get(request_id)
        if times is not None and times.answered is None and times.began is not None:
            times.answered = perf_counter()
            self.prefill.of(times.slice).observe(times.answered - times.began)

    def ended(self, event: TokenEvent) -> None:
        """Its last event."""
        times = self._open.pop(event.request_id, None)
        if times is None or times.span is None or self._tracer is None:
            return
        end, now = perf_counter(), time.time_ns()
        parts = [(QUEUE, times.arrived), (PREFILL, times.began), (DECODE, times.answered)]
        begun = [(name, instant) for name, instant in parts if instant is not None]
        attributes = {REQUEST_ID: event.request_id, SLICE: times.slice}
        for (name, start), stop in zip(begun, [*(instant for _, instant in begun[1:]), end], strict=True):
            span = self._tracer.start_span(
                name, below(times.span), attributes=attributes, start_time=now - _ns(end - start)
            )
            if stop == end and event.finish_reason in _FAILED:
                span.set_status(Status(StatusCode.ERROR, event.error))
            span.end(now - _ns(end - stop))


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
