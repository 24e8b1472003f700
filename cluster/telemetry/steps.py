"""A rank's view of the gang's steps: how long they take, and the spans of those that are sampled.

The leader samples; the others find its span in the step's header and make theirs below it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from time import perf_counter
from typing import Protocol

from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer

from divisi.cluster.gang.control.header import Header
from divisi.cluster.passes import Pass, PassKind
from divisi.cluster.request import Request, TokenEvent
from divisi.cluster.telemetry.batches import BatchHistogram
from divisi.cluster.telemetry.context import below, pack, unpack
from divisi.cluster.telemetry.conventions import (
    DRAFT_PASS,
    EPOCH,
    FULL_PASS,
    ROWS,
    SEAT,
    SEQUENCES,
    STEP,
    STEP_NUMBER,
    TIME_IN,
)
from divisi.cluster.telemetry.requests import RequestTimes

STEP_BOUNDS = (
    0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5,
    10.0,
)  # fmt: skip
PHASES = ("decode", "prefill", "mixed")
"""Of a worker's part of a step: decodes only, prefill chunks only, both."""
_PASS_NAMES = {PassKind.DRAFT: DRAFT_PASS, PassKind.FULL: FULL_PASS}


class _Named(Protocol):
    @property
    def request(self) -> Request: ...


class _Run(Protocol):
    @property
    def sequence(self) -> _Named: ...
    @property
    def completes(self) -> bool: ...


class RunPlan(Protocol):
    """A plan as far as it is told of; see `divisi.cluster.engine.step.plan.StepPlan`."""

    @property
    def rings(self) -> Sequence[_Run]:
        """Runs that decode."""
        ...

    @property
    def scans(self) -> Sequence[_Run]:
        """Runs that prefill."""
        ...


class StepSpans:
    """The spans of one rank's part of the steps that are sampled; `seconds` are totals by part of a step."""

    def __init__(
        self,
        tracer: Tracer | None,
        ratio: float,
        seat: Callable[[], object],
        seconds: Callable[[], Mapping[str, float]],
    ) -> None:
        self._tracer, self._ratio, self._seat, self._seconds = tracer, ratio, seat, seconds
        self._random = random.Random()
        self._own: Span | None = None
        self._pass: Span | None = None
        self._before: Mapping[str, float] = {}

    @property
    def open(self) -> Span | None:
        """The span of the step under way, if it is sampled."""
        return self._own

    def mark(self) -> bytes:
        """For the leader, at the begin of a step: its span for the header, empty where the step is not sampled."""
        if self._tracer is None or self._random.random() >= self._ratio:
            return b""
        self._end()
        self._own = self._tracer.start_span(STEP, below(None))
        return pack(self._own.get_span_context())

    def began(self, header: Header) -> None:
        """The step of a header begins."""
        if not header.trace or self._tracer is None:
            return
        if self._own is None:
            self._own = self._tracer.start_span(STEP, below(unpack(header.trace)), kind=SpanKind.SERVER)
        self._own.set_attributes({SEAT: str(self._seat()), EPOCH: header.epoch, STEP_NUMBER: header.step})

    def pass_began(self, step_pass: Pass, rows: int) -> None:
        """A pass of that step begins."""
        if self._own is None or self._tracer is None:
            return
        self._before = self._seconds()
        parent = below(self._own.get_span_context())
        self._pass = self._tracer.start_span(_PASS_NAMES[step_pass.kind], parent, attributes={ROWS: rows})

    def pass_ended(self) -> None:
        """It has ended; where its time went, over all of its layers."""
        if self._pass is None:
            return
        after, before = self._seconds(), self._before
        spent = {name: total - before.get(name, 0.0) for name, total in after.items()}
        self._pass.set_attributes({f"{TIME_IN}{name}": seconds for name, seconds in spent.items() if seconds > 0})
        self._pass.end()
        self._pass = None

    def ended(self, failure: str = "") -> None:
        """The step has ended, or was aborted."""
        for span in (self._pass, self._own):
            if span is not None and failure:
                span.set_status(Status(StatusCode.ERROR, failure))
        self._end()

    def _end(self) -> None:
        for span in (self._pass, self._own):
            if span is not None:
                span.end()
        self._pass = self._own = None


class WorkerSteps:
    """Implements `gang.observer.WorkerObserver`."""

    def __init__(self, requests: RequestTimes, spans: StepSpans, measure: Callable[[Header], None] | None) -> None:
        """`measure` is told of each step before it begins."""
        self._requests, self._spans, self._measure = requests, spans, measure
        self._began = 0.0
        self.duration = BatchHistogram(
            "divisi_step_duration", "A worker's part of a step, by what it brings.", STEP_BOUNDS, "phase", PHASES
        )
        self._by_phase = tuple(self.duration.of(phase) for phase in PHASES)

    def submitted(self, request: Request, arrived: float) -> None:
        """See WorkerObserver."""
        self._requests.submitted(request, arrived)

    def mark(self) -> bytes:
        """See WorkerObserver."""
        return self._spans.mark()

    def began(self, header: Header, plan: RunPlan | None) -> None:
        """See WorkerObserver."""
        self._began = perf_counter()
        if self._measure is not None:
            self._measure(header)
        if plan is not None:
            for run in plan.scans:
                self._requests.began(run.sequence.request.request_id)
        if header.trace:
            self._spans.began(header)
            if plan is not None:
                self._link(plan)

    def pass_began(self, step_pass: Pass, rows: int) -> None:
        """See WorkerObserver."""
        self._spans.pass_began(step_pass, rows)

    def pass_ended(self) -> None:
        """See WorkerObserver."""
        self._spans.pass_ended()

    def ended(self, plan: RunPlan | None) -> None:
        """See WorkerObserver."""
        if plan is not None:
            for run in plan.scans:
                if run.completes:
                    self._requests.answered(run.sequence.request.request_id)
            phase = 0 if not plan.scans else 2 if plan.rings else 1
            self._by_phase[phase].observe(perf_counter() - self._began)
        self._spans.ended()

    def aborted(self, reason: str) -> None:
        """See WorkerObserver."""
        self._spans.ended(reason)

    def told(self, events: Sequence[TokenEvent]) -> None:
        """See WorkerObserver."""
        for event in events:
            if event.finish_reason is not None:
                self._requests.ended(event)

    def _link(self, plan: RunPlan) -> None:
        """The requests in a sampled step, as far as they are traced."""
        span = self._spans.open
        if span is None:
            return
        runs = [*plan.rings, *plan.scans]
        span.set_attribute(SEQUENCES, len(runs))
        for run in runs:
            if (context := self._requests.span_of(run.sequence.request.request_id)) is not None:
                span.add_link(context)


class ShardSteps:
    """Implements `gang.observer.ShardObserver`."""

    def __init__(self, spans: StepSpans, measure: Callable[[Header], None]) -> None:
        """`measure` is told of each step before it begins."""
        self._spans, self._measure = spans, measure

    def began(self, header: Header) -> None:
        """See ShardObserver."""
        self._measure(header)
        self._spans.began(header)

    def pass_began(self, step_pass: Pass) -> None:
        """See ShardObserver."""
        self._spans.pass_began(step_pass, sum(step_pass.counts.values()))

    def pass_ended(self) -> None:
        """See ShardObserver."""
        self._spans.pass_ended()

    def ended(self, failure: str = "") -> None:
        """See ShardObserver."""
        self._spans.ended(failure)
