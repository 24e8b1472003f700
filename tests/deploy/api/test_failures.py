"""Errors of the engine and clients that leave: statuses, mid-stream errors, cancellation, metrics."""

from __future__ import annotations

import json
import socket
import time
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from divisi.cluster.errors import GangNotReady, Overloaded, RequestRejected, StepAborted
from divisi.cluster.request import Request, TokenEvent
from divisi.deploy.api import GangStatus
from divisi.deploy.api.schema.replies import ErrorBody
from tests.deploy.api.fake_engine import FakeEngine, Step

ASK: dict[str, Any] = {"model": "test-model", "messages": [{"role": "user", "content": "hi"}]}
TEXT: dict[str, Any] = {"model": "test-model", "prompt": "hi"}
TWO: dict[str, Any] = {"model": "test-model", "prompt": ["a", "b b"]}
ENDPOINTS = [("/v1/chat/completions", ASK), ("/v1/completions", TEXT), ("/v1/completions", TWO)]
PARTIAL = TokenEvent("r", (40,), None)
FAILURES: list[tuple[Step, int, str, str | None]] = [
    (Overloaded("1024 requests are queued", 2.5), 429, "overloaded", "3"),
    (GangNotReady("loading"), 503, "gang_not_ready", "1"),
    (RequestRejected("needs 5 pages of 4"), 400, "request_rejected", None),
    (StepAborted("deadline", "expert:1"), 500, "step_aborted", None),
    (RuntimeError("secret"), 500, "internal", None),
    (TokenEvent("r", (), None, finish_reason="error", error="numbers went bad"), 500, "answer_failed", None),
    (TokenEvent("r", (), None, finish_reason="rejected", error="no token is left"), 400, "request_rejected", None),
    (TokenEvent("r", (), None, finish_reason="cancelled"), 503, "gang_not_ready", "1"),
]


@pytest.mark.parametrize(("path", "body"), ENDPOINTS)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("failure", "status", "code", "wait"), FAILURES)
def test_early_failure_keeps_its_status(
    http: httpx.Client,
    engine: FakeEngine,
    path: str,
    body: dict[str, object],
    stream: bool,
    failure: Step,
    status: int,
    code: str,
    wait: str | None,
) -> None:
    engine.script = lambda request: [failure]
    reply = http.post(path, json={**body, "stream": stream})
    assert reply.status_code == status
    error = ErrorBody.model_validate_json(reply.content).error
    assert error.code == code
    assert "secret" not in error.message
    assert reply.headers.get("retry-after") == wait
    engine.reset()
    assert http.post(path, json=body).status_code == 200


@pytest.mark.parametrize(("path", "body"), ENDPOINTS)
@pytest.mark.parametrize(("failure", "status", "code", "wait"), FAILURES)
def test_failure_within_a_stream_is_its_last_event(
    http: httpx.Client,
    engine: FakeEngine,
    path: str,
    body: dict[str, object],
    failure: Step,
    status: int,
    code: str,
    wait: str | None,
) -> None:
    engine.script = lambda request: [PARTIAL, failure]
    reply = http.post(path, json={**body, "stream": True})
    assert reply.status_code == 200
    events = [line.removeprefix("data: ") for line in reply.text.split("\n\n") if line]
    assert ErrorBody.model_validate_json(events[-1]).error.code == code
    assert all("choices" in json.loads(event) for event in events[:-1])


def test_openai_client_raises_typed_errors(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.script = lambda request: [Overloaded("full", 1)]
    with pytest.raises(openai.RateLimitError, match="full"):
        client.completions.create(**TEXT)
    engine.script = lambda request: [PARTIAL, StepAborted("gone")]
    with pytest.raises(openai.APIError, match="gone"):
        list(client.completions.create(**TEXT, stream=True))


def test_an_answer_without_an_end_is_an_error(http: httpx.Client, engine: FakeEngine) -> None:
    engine.script = lambda request: [PARTIAL]
    assert http.post("/v1/completions", json=TEXT).status_code == 500


def test_one_failing_prompt_ends_the_others(http: httpx.Client, engine: FakeEngine) -> None:
    def script(request: Request) -> list[Step]:
        return [RequestRejected("no")] if request.request_id.endswith("-1") else [PARTIAL] * 1000

    engine.script = script
    assert http.post("/v1/completions", json=TWO).status_code == 400
    assert engine.open == 0


@pytest.mark.parametrize(("path", "body"), ENDPOINTS)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("held", ["before", "after"])
def test_leaving_cancels_at_once(
    engine: FakeEngine, url: str, path: str, body: dict[str, object], stream: bool, held: str
) -> None:
    engine.held = held
    content = json.dumps({**body, "stream": stream}).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    address = urlsplit(url)
    with socket.create_connection((address.hostname, address.port or 0)) as connection:
        connection.sendall(head.encode() + content)
        assert engine.waiting.wait(10)
        assert not engine.closed.is_set()
    assert engine.closed.wait(10)
    assert engine.all_closed(10)


def test_leaving_while_sending_the_body_is_no_server_error(
    engine: FakeEngine, http: httpx.Client, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    key = ("divisi_http_requests_total", (("method", "POST"), ("path", "/v1/completions"), ("status", "499")))
    before = _samples(http).get(key, 0.0)
    address = urlsplit(url)
    with socket.create_connection((address.hostname, address.port or 0)) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
        )
    deadline = time.monotonic() + 10
    while _samples(http).get(key, 0.0) == before:
        assert time.monotonic() < deadline, "it was never counted"
    assert not caplog.records


def test_closing_a_stream_cancels(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.held = "after"
    stream = client.chat.completions.create(**ASK, stream=True)
    next(iter(stream))
    assert not engine.closed.is_set()
    stream.close()
    assert engine.closed.wait(10)


def test_health(http: httpx.Client, engine: FakeEngine) -> None:
    assert http.get("/v1/health/live").status_code == 200
    assert http.get("/v1/health/ready").status_code == 200
    assert http.get("/health").status_code == 200
    engine.gang = GangStatus(False, "loading weights")
    for path in ("/v1/health/ready", "/health"):
        reply = http.get(path)
        assert reply.status_code == 503
        assert reply.json()["reason"] == "loading weights"
    assert http.get("/v1/health/live").status_code == 200


@pytest.mark.parametrize("path", ["/health", "/v1/health/ready", "/v1/health/live", "/v1/models", "/metrics"])
def test_head_is_get_without_a_body(http: httpx.Client, path: str) -> None:
    reply = http.head(path)
    assert reply.status_code == 200
    assert not reply.content


def test_health_when_the_status_breaks(http: httpx.Client, engine: FakeEngine) -> None:
    engine.held = "broken status"
    assert http.get("/v1/health/ready").status_code == 503
    assert http.get("/metrics").status_code == 200
    assert http.get("/v1/health/live").status_code == 200


def test_health_of_a_silent_gang(http: httpx.Client, engine: FakeEngine) -> None:
    engine.held = "status"
    reply = http.get("/v1/health/ready")
    assert reply.status_code == 503
    assert "does not answer" in reply.json()["reason"]


def _samples(http: httpx.Client) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    page = http.get("/metrics")
    assert page.status_code == 200
    families = text_string_to_metric_families(page.text)
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


OK = {"path": "/v1/completions", "method": "POST", "status": "200"}


def test_metrics(http: httpx.Client, engine: FakeEngine) -> None:
    before = _samples(http)
    http.post("/v1/completions", json={**TEXT, "max_tokens": 5})
    http.post("/v1/completions", json={**TEXT, "stream": True, "max_tokens": 5})
    http.post("/v1/completions", content=b"{", headers={"content-type": "application/json"})
    http.get("/nowhere/17")
    after = _samples(http)

    def grown(name: str, **labels: str) -> float:
        key = (name, tuple(sorted(labels.items())))
        return after.get(key, 0.0) - before.get(key, 0.0)

    # An answer is counted when it is sent, and the client may have it a moment earlier.
    until = time.monotonic() + 5
    while grown("divisi_requests_finished_total", reason="length") + grown("divisi_http_requests_total", **OK) < 4:
        assert time.monotonic() < until, "not counted"
        after = _samples(http)

    assert grown("divisi_http_requests_total", **OK) == 2
    assert grown("divisi_http_requests_total", path="/v1/completions", method="POST", status="400") == 1
    assert grown("divisi_http_requests_total", path="unmatched", method="GET", status="404") == 1
    assert grown("divisi_completion_tokens_total") == 10
    assert grown("divisi_prompt_tokens_total") == 2 * len(engine.tokenizer.encode("hi"))
    assert grown("divisi_requests_finished_total", reason="length") == 2
    assert grown("divisi_time_to_first_token_seconds_count", slice="chat") == 2
    assert grown("divisi_time_per_output_token_seconds_count", slice="chat") == 2
    assert after[("divisi_step_seconds_total", (("part", "mixer"),))] == 1.5
    assert after[("divisi_ready", ())] == 1
    assert after[("divisi_http_open_requests", ())] == 1  # this very request


def test_refused_requests_are_no_failed_answers(http: httpx.Client, engine: FakeEngine) -> None:
    before = _samples(http)
    engine.script = lambda request: [Overloaded("full", 1)]
    assert http.post("/v1/completions", json=TEXT).status_code == 429
    after = _samples(http)
    for reason, grown in (("refused", 1), ("error", 0)):
        key = ("divisi_requests_finished_total", (("reason", reason),))
        assert after.get(key, 0.0) - before.get(key, 0.0) == grown
    tokens = ("divisi_prompt_tokens_total", ())
    assert after[tokens] == before[tokens]
