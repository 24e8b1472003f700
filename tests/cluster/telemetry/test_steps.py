"""What is recorded of requests and steps, with the SDK's own exporter in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import Tracer

from divisi.cluster.gang.control.header import Header
from divisi.cluster.passes import Pass, PassKind
from divisi.cluster.request import EndReason, Request, Sampling, TokenEvent
from divisi.cluster.telemetry.requests import RequestTimes
from divisi.cluster.telemetry.steps import ShardSteps, StepSpans, WorkerSteps

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACED = f"00-{TRACE}-{PARENT}-01"
FULL = Pass(PassKind.FULL, {0: 3})


@dataclass(frozen=True)
class Sequence_:
    request: Request


@dataclass(frozen=True)
class Run:
    sequence: Sequence_
    completes: bool = True


@dataclass(frozen=True)
class Plan:
    rings: Sequence[Run] = ()
    scans: Sequence[Run] = ()


def request(name: str, trace: str = "") -> Request:
    return Request(name, (1, 2), 4, Sampling(), trace=trace)


def run(name: str, completes: bool = True) -> Run:
    return Run(Sequence_(request(name)), completes)


def end(name: str, reason: EndReason = "stop", error: str | None = None) -> TokenEvent:
    return TokenEvent(name, (), None, finish_reason=reason, error=error)


@pytest.fixture
def exported() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def tracer(exported: InMemorySpanExporter) -> Tracer:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exported))
    return provider.get_tracer("test")


class Seconds:
    """What the step's parts have taken so far."""

    def __init__(self) -> None:
        self.now: dict[str, float] = {"mixer": 1.0}

    def __call__(self) -> Mapping[str, float]:
        return dict(self.now)


def worker(tracer: Tracer | None, ratio: float, seconds: Seconds | None = None) -> tuple[WorkerSteps, RequestTimes]:
    requests = RequestTimes(tracer)
    spans = StepSpans(tracer, ratio, lambda: "attention:0", seconds or Seconds())
    return WorkerSteps(requests, spans, None), requests


def spans_of(exported: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    return {span.name: span for span in exported.get_finished_spans()}


def step(steps: WorkerSteps, plan: Plan, *, number: int = 1) -> None:
    header = Header(1, number, (FULL,), steps.mark())
    steps.began(header, plan)
    if header.trace:
        steps.pass_began(FULL, 3)
        steps.pass_ended()
    steps.ended(plan)


def test_a_traced_request_has_three_spans_below_its_root(tracer: Tracer, exported: InMemorySpanExporter) -> None:
    steps, _ = worker(tracer, 0.0)
    steps.submitted(request("a", TRACED), arrived=0.0)
    step(steps, Plan(scans=[run("a", completes=False)]))
    step(steps, Plan(scans=[run("a")]))
    step(steps, Plan(rings=[run("a")]))
    steps.told([TokenEvent("a", (5,), None)])
    assert not exported.get_finished_spans(), "nothing before its end"
    steps.told([end("a")])
    found = spans_of(exported)
    assert list(found) == ["queue", "prefill", "decode"]
    for span in found.values():
        assert span.parent is not None
        assert span.parent.span_id == int(PARENT, 16)
        assert span.context.trace_id == int(TRACE, 16)
        assert (span.attributes or {})["divisi.request.id"] == "a"
    assert found["queue"].end_time == found["prefill"].start_time
    assert found["prefill"].end_time == found["decode"].start_time


def test_a_request_that_ends_in_the_queue_has_one(tracer: Tracer, exported: InMemorySpanExporter) -> None:
    steps, _ = worker(tracer, 0.0)
    steps.submitted(request("a", TRACED), arrived=0.0)
    steps.told([end("a", "error", "the attention worker failed")])
    (span,) = exported.get_finished_spans()
    assert span.name == "queue"
    assert not span.status.is_ok
    assert span.status.description == "the attention worker failed"


def test_a_request_that_is_not_traced_has_none_and_is_counted(tracer: Tracer, exported: InMemorySpanExporter) -> None:
    steps, requests = worker(tracer, 0.0)
    steps.submitted(request("a"), arrived=0.0)
    step(steps, Plan(scans=[run("a")]))
    steps.told([end("a")])
    assert not exported.get_finished_spans()
    assert sum(requests.queue.of("chat").counts) == 1
    assert sum(requests.prefill.of("chat").counts) == 1
    assert requests.span_of("a") is None


def test_without_a_tracer_nothing_is_recorded() -> None:
    steps, requests = worker(None, 1.0)
    assert steps.mark() == b""
    steps.submitted(request("a", TRACED), arrived=0.0)
    assert requests.span_of("a") is None
    step(steps, Plan(scans=[run("a")]))
    steps.told([end("a")])


@pytest.mark.parametrize(
    ("plan", "phase"),
    [
        (Plan(rings=[run("a")]), "decode"),
        (Plan(scans=[run("a")]), "prefill"),
        (Plan(rings=[run("a")], scans=[run("b")]), "mixed"),
    ],
)
def test_steps_are_counted_by_what_they_bring(plan: Plan, phase: str) -> None:
    steps, _ = worker(None, 0.0)
    step(steps, plan)
    steps.began(Header(1, 2, (FULL,)), None)
    steps.ended(None)  # others' work
    assert {name: sum(steps.duration.of(name).counts) for name in ("decode", "prefill", "mixed")} == {
        "decode": 0, "prefill": 0, "mixed": 0, phase: 1,
    }  # fmt: skip


def test_a_sampled_step_has_a_span_for_each_rank(tracer: Tracer, exported: InMemorySpanExporter) -> None:
    seconds = Seconds()
    steps, _ = worker(tracer, 1.0, seconds)
    steps.submitted(request("a", TRACED), arrived=0.0)
    steps.submitted(request("b"), arrived=0.0)
    header = Header(7, 3, (FULL,), steps.mark())
    shard = ShardSteps(StepSpans(tracer, 0.0, lambda: "expert:1", lambda: {"experts": 0.0}), lambda header: None)
    plan = Plan(rings=[run("b")], scans=[run("a")])
    steps.began(header, plan)
    shard.began(header)
    steps.pass_began(FULL, 3)
    seconds.now |= {"mixer": 1.5, "experts": 0.25}
    shard.pass_began(FULL)
    shard.pass_ended()
    steps.pass_ended()
    steps.ended(plan)
    shard.ended()
    spans = exported.get_finished_spans()
    by_seat = {(s.attributes or {}).get("divisi.seat"): s for s in spans if s.name == "step"}
    root, other = by_seat["attention:0"], by_seat["expert:1"]
    assert root.parent is None
    assert other.parent is not None
    assert other.parent.span_id == root.context.span_id
    assert {s.context.trace_id for s in spans} == {root.context.trace_id}
    assert [link.context.span_id for link in root.links] == [int(PARENT, 16)], "only what is traced"
    assert dict(root.attributes or {}) == {
        "divisi.seat": "attention:0", "divisi.epoch": 7, "divisi.step": 3, "divisi.sequences": 2,
    }  # fmt: skip
    passes = [s for s in spans if s.name == "full pass"]
    assert {s.parent.span_id for s in passes if s.parent} == {root.context.span_id, other.context.span_id}
    own = next(s for s in passes if s.parent and s.parent.span_id == root.context.span_id)
    assert dict(own.attributes or {}) == {"divisi.rows": 3, "divisi.time.mixer": 0.5, "divisi.time.experts": 0.25}


def test_an_aborted_step_ends_as_a_failure(tracer: Tracer, exported: InMemorySpanExporter) -> None:
    steps, _ = worker(tracer, 1.0)
    header = Header(1, 1, (FULL,), steps.mark())
    steps.began(header, Plan(rings=[run("a")]))
    steps.pass_began(FULL, 1)
    steps.aborted("expert:0: gone")
    found = spans_of(exported)
    assert {name: span.status.description for name, span in found.items()} == {
        "full pass": "expert:0: gone", "step": "expert:0: gone",
    }  # fmt: skip
    steps.aborted("expert:0: gone")
    assert len(exported.get_finished_spans()) == 2, "nothing is under way any more"


def test_about_as_many_steps_are_sampled_as_asked(tracer: Tracer) -> None:
    spans = StepSpans(tracer, 0.25, lambda: "", dict)
    assert 150 < sum(bool(spans.mark()) for _ in range(1000)) < 350
