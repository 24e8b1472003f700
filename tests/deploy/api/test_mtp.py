"""The request's say in multi-token prediction: its limits reach the worker, and usage says what became of drafts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest

from divisi.cluster.request import Request, TokenEvent
from divisi.model.text import TextCodec
from tests.deploy.api.conftest import MODEL, SETTINGS
from tests.deploy.api.fake_engine import FakeEngine, events_of, serve

CAP = 3
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
BODIES = {
    "/v1/chat/completions": {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]},
    "/v1/completions": {"model": MODEL, "prompt": "hello"},
}


def drafting(request: Request) -> list[TokenEvent]:
    """Three tokens a step; of as many drafts two stand."""
    events = events_of(request, [*range(40, 49)], group=3)
    return [replace(event, drafted=3 * n, accepted=2 * n) for n, event in enumerate(events, 1)]


@pytest.fixture(scope="module")
def drafter(text: TextCodec) -> FakeEngine:
    return FakeEngine(text.tokenizer)


@pytest.fixture(scope="module")
def url(drafter: FakeEngine, text: TextCodec) -> Iterator[str]:
    with serve(drafter, text, SETTINGS.model_copy(update={"max_draft_tokens": CAP})) as base:
        yield base


def ask(url: str, path: str, **fields: Any) -> httpx.Response:
    return httpx.post(url + path, json=BODIES[path] | {"max_tokens": 9} | fields, timeout=10)


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    ("mtp", "expected"),
    [
        (None, CAP),
        ({}, CAP),
        ({"max_draft_tokens": 0}, 0),
        ({"max_draft_tokens": 2}, 2),
        ({"max_draft_tokens": 99}, CAP),
    ],
)
def test_limits_reach_the_worker(
    drafter: FakeEngine, url: str, path: str, mtp: dict[str, int] | None, expected: int
) -> None:
    drafter.reset()
    drafter.script = drafting
    reply = ask(url, path, mtp=mtp).json()
    (request,) = drafter.requests
    assert request.max_draft_tokens == expected
    told = {"accepted_prediction_tokens": 6, "rejected_prediction_tokens": 3}
    assert reply["usage"]["completion_tokens_details"] == told | ({} if mtp is None else {"max_draft_tokens": expected})
    assert reply["usage"]["completion_tokens"] == 9, "drafts that were rejected are nobody's tokens"


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    ("mtp", "param"),
    [
        ({"max_draft_tokens": -1}, "mtp.max_draft_tokens"),
        ({"max_draft_tokens": 1.5}, "mtp.max_draft_tokens"),
        ({"max_draft_tokens": "2"}, "mtp.max_draft_tokens"),
        ({"tool_call_draft_tokens": -1}, "mtp.tool_call_draft_tokens"),
        ({"depth": 1}, "mtp"),
        (3, "mtp"),
    ],
)
def test_wrong_values_are_refused(drafter: FakeEngine, url: str, path: str, mtp: Any, param: str) -> None:
    drafter.reset()
    reply = ask(url, path, mtp=mtp)
    assert reply.status_code == 400
    assert reply.json()["error"]["param"].startswith(param)
    assert not drafter.requests


@pytest.mark.parametrize(("mtp", "expected"), [(None, 0), ({"tool_call_draft_tokens": 2}, 2), ({}, 0)])
def test_calls_are_drafted_token_by_token_unless_more_is_allowed(
    drafter: FakeEngine, url: str, mtp: dict[str, int] | None, expected: int
) -> None:
    drafter.reset()
    ask(url, "/v1/chat/completions", tools=[TOOL], mtp=mtp)
    (request,) = drafter.requests
    assert [span.max_draft_tokens for span in request.spans if not span.leading] == [expected]


def test_streams_tell_it_in_their_last_chunk(drafter: FakeEngine, url: str) -> None:
    drafter.reset()
    drafter.script = drafting
    text = ask(url, "/v1/chat/completions", stream=True, stream_options={"include_usage": True}).text
    assert '"accepted_prediction_tokens":6,"rejected_prediction_tokens":3' in text


@pytest.mark.parametrize("path", BODIES)
def test_without_the_layer_it_is_ignored(engine: FakeEngine, text: TextCodec, path: str) -> None:
    with serve(engine, text, SETTINGS) as base:
        reply = ask(base, path, mtp={"max_draft_tokens": 2})
    assert reply.status_code == 200
    assert "completion_tokens_details" not in reply.json()["usage"]
    assert engine.requests[-1].max_draft_tokens is None
