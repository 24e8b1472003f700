"""Spans of requests in the ingress, over HTTP, and the ids in its log."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator

import httpx
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from divisi.cluster.telemetry.process import Telemetry
from divisi.cluster.telemetry.spec import TelemetrySpec
from divisi.deploy.logs import JsonFormatter
from divisi.model.text import TextCodec
from tests.deploy.api.conftest import MODEL, SETTINGS
from tests.deploy.api.fake_engine import FakeEngine, serve

TRACE = "0af7651916cd43dd8448eb211c80319c"
SAMPLED, NOT_SAMPLED = f"00-{TRACE}-b7ad6b7169203331-01", f"00-{TRACE}-b7ad6b7169203331-00"
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "secret words"}]}


@pytest.fixture
def exported() -> InMemorySpanExporter:
    return InMemorySpanExporter()


def telemetry(exported: InMemorySpanExporter, **changes: object) -> Telemetry:
    made = Telemetry(TelemetrySpec(scraped=False, model=MODEL, **changes), "ingress")  # type: ignore[arg-type]
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exported))
    made.tracer = provider.get_tracer("test")
    return made


@pytest.fixture
def traced(engine: FakeEngine, text: TextCodec, exported: InMemorySpanExporter) -> Iterator[httpx.Client]:
    with serve(engine, text, SETTINGS, telemetry=telemetry(exported)) as url, httpx.Client(base_url=url) as client:
        yield client


def by_name(exported: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    """Once the root has ended, which is a moment after the client has its answer."""
    until = time.monotonic() + 5
    while not any(span.name.endswith(MODEL) for span in exported.get_finished_spans()):
        assert time.monotonic() < until, "no root"
        time.sleep(0.01)  # the exporter in memory has no event
    spans = exported.get_finished_spans()
    assert len({span.name for span in spans}) == len(spans)
    return {span.name: span for span in spans}


def test_one_tree_and_the_workers_spans_go_below_its_root(
    traced: httpx.Client, engine: FakeEngine, exported: InMemorySpanExporter
) -> None:
    reply = traced.post("/v1/chat/completions", json={**CHAT, "max_tokens": 3, "temperature": 0.5})
    assert reply.status_code == 200
    found = by_name(exported)
    assert set(found) == {f"chat {MODEL}", "ingress", "detokenise"}
    root = found[f"chat {MODEL}"]
    assert root.parent is None
    assert {span.parent.span_id for name, span in found.items() if name != f"chat {MODEL}" and span.parent} == {
        root.context.span_id
    }
    asked = engine.requests[-1].trace.split("-")
    assert asked[1:3] == [format(root.context.trace_id, "032x"), format(root.context.span_id, "016x")]
    attributes = dict(root.attributes or {})
    assert attributes["gen_ai.operation.name"] == "chat"
    assert attributes["gen_ai.request.max_tokens"] == 3
    assert attributes["gen_ai.request.temperature"] == 0.5
    assert attributes["gen_ai.usage.output_tokens"] == reply.json()["usage"]["completion_tokens"]
    assert attributes["gen_ai.response.finish_reasons"] == ("length",)
    assert attributes["gen_ai.response.id"] == reply.json()["id"]
    assert attributes["http.response.status_code"] == 200
    assert not any("secret" in str(value) for span in found.values() for value in (span.attributes or {}).values())


def test_the_clients_trace_goes_on(traced: httpx.Client, exported: InMemorySpanExporter) -> None:
    traced.post("/v1/completions", json={"model": MODEL, "prompt": "x"}, headers={"traceparent": SAMPLED})
    root = by_name(exported)[f"text_completion {MODEL}"]
    assert root.parent is not None
    assert format(root.context.trace_id, "032x") == TRACE


def test_what_the_client_does_not_sample_is_not_traced(
    traced: httpx.Client, engine: FakeEngine, exported: InMemorySpanExporter
) -> None:
    traced.post("/v1/completions", json={"model": MODEL, "prompt": "x"}, headers={"traceparent": NOT_SAMPLED})
    traced.get("/v1/models", headers={"traceparent": SAMPLED})
    assert not exported.get_finished_spans()
    assert engine.requests[-1].trace == ""


def test_a_refused_request_is_a_failed_root(traced: httpx.Client, exported: InMemorySpanExporter) -> None:
    assert traced.post("/v1/completions", json={"model": "other", "prompt": "x"}).status_code == 404
    found = by_name(exported)
    assert set(found) == {f"text_completion {MODEL}", "ingress"}
    assert dict(found[f"text_completion {MODEL}"].attributes or {})["error.type"] == "404"
    assert not found[f"text_completion {MODEL}"].status.is_ok


def test_content_only_where_it_is_asked_for(
    engine: FakeEngine, text: TextCodec, exported: InMemorySpanExporter
) -> None:
    with serve(engine, text, SETTINGS, telemetry=telemetry(exported, content=True)) as url:
        reply = httpx.post(f"{url}/v1/chat/completions", json=CHAT)
    attributes = dict(by_name(exported)[f"chat {MODEL}"].attributes or {})
    assert "secret words" in str(attributes["gen_ai.input.messages"])
    (message,) = json.loads(str(attributes["gen_ai.output.messages"]))
    assert message["parts"][0]["content"] == reply.json()["choices"][0]["message"]["content"]


def test_no_request_is_traced_at_a_ratio_of_zero(
    engine: FakeEngine, text: TextCodec, exported: InMemorySpanExporter
) -> None:
    with serve(engine, text, SETTINGS, telemetry=telemetry(exported, trace_ratio=0.0)) as url:
        httpx.post(f"{url}/v1/chat/completions", json=CHAT)
    assert not exported.get_finished_spans()


def test_log_lines_have_both_ids(
    traced: httpx.Client, engine: FakeEngine, exported: InMemorySpanExporter, caplog: pytest.LogCaptureFixture
) -> None:
    lines: list[dict[str, object]] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(json.loads(self.format(record)))

    handler, log = Kept(), logging.getLogger("divisi")
    level = log.level
    handler.setFormatter(JsonFormatter("ingress:1"))
    log.addHandler(handler)
    log.setLevel("INFO")
    engine.script = lambda request: [ZeroDivisionError("a bug")]
    try:
        traced.post("/v1/completions", json={"model": MODEL, "prompt": "x"}, headers={"x-request-id": "mine"})
        until = time.monotonic() + 5
        while not any(line["message"] == "request" for line in lines):
            assert time.monotonic() < until, "the request is not in the log"
            time.sleep(0.01)  # it is written after the reply
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
    trace_id = format(by_name(exported)[f"text_completion {MODEL}"].context.trace_id, "032x")
    of_it = [line for line in lines if line.get("request_id") == "mine"]
    assert {line["message"] for line in of_it} >= {"request", "POST /v1/completions failed"}
    assert {line["trace_id"] for line in of_it} == {trace_id}


def test_targets_are_listed_for_prometheus(traced: httpx.Client, engine: FakeEngine) -> None:
    from divisi.cluster.seats import ScrapeTarget
    from divisi.deploy.api import GangStatus

    engine.gang = GangStatus(True, "", targets=(
        ScrapeTarget("coordinator", 0, "10.0.0.1", 5), ScrapeTarget("ingress", 1, "10.0.0.1", 6),
        ScrapeTarget("attention", 0, "10.0.0.2", 7), ScrapeTarget("expert", 3, "fd00::1", 8),
    ))  # fmt: skip
    assert traced.get("/metrics/targets").json() == [
        {"targets": ["10.0.0.1:5"], "labels": {"role": "coordinator"}},
        {"targets": ["10.0.0.1:6"], "labels": {"role": "ingress", "ingress": "1"}},
        {"targets": ["10.0.0.2:7"], "labels": {"role": "attention", "worker": "0"}},
        {"targets": ["[fd00::1]:8"], "labels": {"role": "expert", "shard": "3"}},
    ]
