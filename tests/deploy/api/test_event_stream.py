"""Streams whose answer takes its time: the status, comments that keep the connection alive, late failures."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from divisi.cluster.errors import GangNotReady, Overloaded, RequestRejected, StepAborted
from divisi.cluster.request import Request, TokenEvent
from divisi.deploy.api import GangStatus
from divisi.deploy.api.reply.event_stream import COMMENT
from divisi.deploy.limits import Gate, GateLimits
from divisi.model.text import TextCodec
from tests.deploy.api.conftest import MODEL, SETTINGS
from tests.deploy.api.fake_engine import FakeEngine, Step, events_of, serve

SOON = SETTINGS.model_copy(update={"headers_after_s": 0.05, "keepalive_s": 0.05})
CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "stream": True}
TEXT: dict[str, Any] = {"model": MODEL, "prompt": "hi", "stream": True}
TWO: dict[str, Any] = {**TEXT, "prompt": ["a", "b"]}
ENDPOINTS = [("/v1/chat/completions", CHAT), ("/v1/completions", TEXT), ("/v1/completions", TWO)]
LATE: list[tuple[Step, str]] = [
    (Overloaded("full", 1), "overloaded"),
    (GangNotReady("loading"), "gang_not_ready"),
    (RequestRejected("needs 5 pages of 4"), "request_rejected"),
    (StepAborted("deadline"), "step_aborted"),
    (RuntimeError("secret"), "internal"),
    (TokenEvent("r", (), None, finish_reason="error", error="numbers went bad"), "answer_failed"),
]


@pytest.fixture(scope="module")
def served(text: TextCodec) -> Iterator[tuple[httpx.Client, FakeEngine]]:
    engine = FakeEngine(text.tokenizer)
    with serve(engine, text, SOON) as url, httpx.Client(base_url=url, timeout=20) as client:
        yield client, engine
        assert engine.all_closed(10)


def comments_then(lines: Iterator[str], release: threading.Event, after: int = 3) -> tuple[int, list[str]]:
    """Read a stream; once `after` comments have come, the engine may go on. Returns the comments and the events."""
    comments, events = 0, []
    for line in lines:
        if line.startswith(":"):
            comments += 1
            if comments >= after:
                release.set()
        elif line:
            events.append(line.removeprefix("data: "))
    return comments, events


def text_of(events: list[str]) -> str:
    found = ""
    for choice in [choice for event in events[:-1] for choice in json.loads(event)["choices"]]:
        found += choice.get("text") or choice.get("delta", {}).get("content") or ""
    return found


@pytest.mark.parametrize(("path", "body"), ENDPOINTS)
@pytest.mark.parametrize("at", [0, 2], ids=["before the first token", "in a pause"])
def test_a_silence_is_filled_with_comments(
    served: tuple[httpx.Client, FakeEngine], path: str, body: dict[str, Any], at: int
) -> None:
    client, engine = served
    go_on = threading.Event()
    ids = engine.tokenizer.encode("Hello, world")

    def script(request: Request) -> list[Step]:
        events: list[Step] = [*events_of(request, ids)]
        return [*events[:at], go_on, *events[at:]]

    engine.script = script
    with client.stream("POST", path, json=body) as reply:
        assert reply.status_code == 200
        comments, events = comments_then(reply.iter_lines(), go_on)
    assert comments >= 3
    assert events[-1] == "[DONE]"
    assert sorted(text_of(events)) == sorted("Hello, world" * (2 if body is TWO else 1))


@pytest.mark.parametrize(("path", "body"), ENDPOINTS)
@pytest.mark.parametrize(("failure", "code"), LATE)
def test_a_failure_after_the_status_is_the_last_event(
    served: tuple[httpx.Client, FakeEngine], path: str, body: dict[str, Any], failure: Step, code: str
) -> None:
    client, engine = served
    go_on = threading.Event()
    engine.script = lambda request: [go_on, failure]
    with client.stream("POST", path, json=body) as reply:
        assert reply.status_code == 200
        _, events = comments_then(reply.iter_lines(), go_on, after=1)
    assert len(events) == 1
    error = json.loads(events[0])["error"]
    assert error["code"] == code
    assert "secret" not in error["message"]


def test_the_openai_client_reads_over_comments(served: tuple[httpx.Client, FakeEngine]) -> None:
    client, engine = served
    for failure in (False, True):
        go_on = threading.Event()
        timer = threading.Timer(0.3, go_on.set)
        engine.script = _script(engine, go_on, failure)
        with openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0, timeout=20) as sdk:
            timer.start()
            stream = sdk.chat.completions.create(**CHAT)
            if failure:
                with pytest.raises(openai.APIError, match="gone"):
                    list(stream)
            else:
                said = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
                assert "".join(said) == "Hello"
        timer.join()


def _script(engine: FakeEngine, go_on: threading.Event, failure: bool) -> Any:
    ids = engine.tokenizer.encode("Hello")
    return lambda request: [go_on, *([StepAborted("gone")] if failure else events_of(request, ids))]


def test_a_whole_reply_waits(served: tuple[httpx.Client, FakeEngine]) -> None:
    client, engine = served
    go_on = threading.Event()
    threading.Timer(0.2, go_on.set).start()
    engine.script = _script(engine, go_on, True)
    reply = client.post("/v1/completions", json={**TEXT, "stream": False})
    assert (reply.status_code, reply.json()["error"]["code"]) == (500, "step_aborted")


@pytest.mark.parametrize(("path", "body"), ENDPOINTS)
def test_readiness_is_judged_before_the_status(
    served: tuple[httpx.Client, FakeEngine], path: str, body: dict[str, Any]
) -> None:
    client, engine = served
    engine.reset()
    engine.judges_after_s = 0.2
    engine.gang = GangStatus(False, "loading weights")
    reply = client.post(path, json=body)
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "gang_not_ready")
    assert reply.headers["retry-after"] == "1"
    engine.reset()


def test_nobody_is_let_in_by_a_comment(text: TextCodec) -> None:
    """Admission is judged before the status, however soon that goes out."""
    engine = FakeEngine(text.tokenizer)
    go_on = threading.Event()
    engine.script = lambda request: [go_on, *events_of(request, [40])]
    gate = Gate(GateLimits(max_requests=1))
    with serve(engine, text, SOON, gate) as url, httpx.Client(base_url=url, timeout=20) as client:
        with client.stream("POST", "/v1/completions", json=TEXT) as reply:
            lines = reply.iter_lines()
            assert next(lines) == COMMENT.decode().strip()
            assert client.post("/v1/completions", json=TEXT).status_code == 429
            _, events = comments_then(lines, go_on, after=1)
        assert events[-1] == "[DONE]"


def test_a_time_out_after_the_status_is_the_last_event(text: TextCodec) -> None:
    engine = FakeEngine(text.tokenizer)
    engine.held = "before"
    gate = Gate(GateLimits(request_timeout_s=0.3))
    with serve(engine, text, SOON, gate) as url, httpx.Client(base_url=url, timeout=20) as client:
        with client.stream("POST", "/v1/completions", json=TEXT) as reply:
            comments, events = comments_then(reply.iter_lines(), threading.Event())
        assert (reply.status_code, comments > 1) == (200, True)
        assert [json.loads(event)["error"]["code"] for event in events] == ["request_timeout"]
        assert engine.all_closed(10)


def test_a_client_that_leaves_among_comments_cancels(served: tuple[httpx.Client, FakeEngine]) -> None:
    client, engine = served
    engine.reset()
    engine.held = "before"
    with client.stream("POST", "/v1/completions", json=TEXT) as reply:
        assert next(reply.iter_lines()).startswith(":")
    assert engine.closed.wait(10)
    engine.reset()


def test_a_stream_that_says_something_has_no_comments(text: TextCodec) -> None:
    engine = FakeEngine(text.tokenizer)
    with serve(engine, text, SETTINGS) as url, httpx.Client(base_url=url, timeout=20) as client:
        reply = client.post("/v1/completions", json=TEXT)
    assert "\n:" not in reply.text
    assert reply.text.startswith("data:")
