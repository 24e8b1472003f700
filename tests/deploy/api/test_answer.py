"""Streamed and whole answers are the same, and neither depends on how tokens come grouped."""

from __future__ import annotations

import json
from typing import Any

import httpx
from hypothesis import given
from hypothesis import strategies as st

from divisi.cluster.request import Request, Sampling, TokenEvent, TokenLogprob
from divisi.deploy.api.answer import Answer, Delta
from divisi.deploy.api.chat import ChatWriter
from divisi.deploy.api.compile import Call
from divisi.deploy.api.completions import CompletionWriter
from divisi.deploy.api.protocol import ChatBody, CompletionBody
from divisi.model.text import TextCodec
from tests.deploy.api.fake_engine import FakeEngine, events_of

IDS = st.lists(st.integers(0, 599), max_size=40)
STOPS = st.lists(st.sampled_from(["a", "the", "\ufffd", "\n", " \ufffd", "e ", "ab", "<think>"]), max_size=3)


def run(text: TextCodec, ids: list[int], stops: list[str], group: int, **options: Any) -> tuple[list[Delta], Call]:

    logprobs = options.pop("logprobs", None)
    echo = options.pop("echo", False)
    request = Request("r", tuple(ids[:7]) or (5,), 1000, Sampling(), frozenset(), logprobs, logprobs if echo else None)
    call = Call(request, tuple(stops), echo=echo)
    answer = Answer(call, text.tokenizer)
    deltas: list[Delta] = []
    for event in events_of(request, ids, group=group):
        deltas.append(answer.push(event))
        if deltas[-1].finish_reason is not None:
            break
    return deltas, call


def joined(deltas: list[Delta]) -> Delta:
    whole = Delta("", [])
    for delta in deltas:
        whole.text += delta.text
        whole.token_ids += delta.token_ids
        whole.tokens += delta.tokens
        whole.finish_reason, whole.stop_reason = delta.finish_reason, delta.stop_reason
    return whole


@given(ids=IDS, stops=STOPS, group=st.integers(1, 9), echo=st.booleans())
def test_grouping_changes_nothing(text: TextCodec, ids: list[int], stops: list[str], group: int, echo: bool) -> None:
    one, _ = run(text, ids, stops, 1, logprobs=1, echo=echo)
    many, _ = run(text, ids, stops, group, logprobs=1, echo=echo)
    assert joined(one) == joined(many)


@given(ids=IDS, stops=STOPS, group=st.integers(1, 9))
def test_text_is_the_whole_decoding_cut_at_the_stop(
    text: TextCodec, ids: list[int], stops: list[str], group: int
) -> None:
    answer = joined(run(text, ids, stops, group)[0])
    whole = text.tokenizer.decode(ids)
    found = [(at + len(stop), at, stop) for stop in stops if (at := whole.find(stop)) >= 0]
    if found:
        assert (answer.text, answer.stop_reason) == (whole[: min(found)[1]], min(found)[2])
    else:
        assert (answer.text, answer.stop_reason) == (whole, None)
        assert answer.token_ids == ids


def parse(events: bytes) -> list[dict[str, Any]]:
    return [
        json.loads(event.removeprefix(b"data: "))
        for event in events.split(b"\n\n")
        if event not in (b"", b"data: [DONE]")
    ]


@given(ids=IDS, stops=STOPS, group=st.integers(1, 9), logprobs=st.sampled_from([None, 0, 2]), token_ids=st.booleans())
def test_completion_streamed_equals_whole(
    text: TextCodec, ids: list[int], stops: list[str], group: int, logprobs: int | None, token_ids: bool
) -> None:
    deltas, call = run(text, ids, stops, group, logprobs=logprobs, echo=True)
    body = CompletionBody(model="m", prompt="x", echo=True, logprobs=logprobs, return_token_ids=token_ids)
    writer = CompletionWriter(body, [call], "m", text.tokenizer, "fp")
    whole = json.loads(writer.whole([joined(deltas)]))["choices"][0]
    chunks = parse(b"".join(writer.chunk(0, delta) for delta in deltas) + writer.closing())
    choices = [chunk["choices"][0] for chunk in chunks]
    assert "".join(choice["text"] for choice in choices) == whole["text"]
    assert choices[-1]["finish_reason"] == whole["finish_reason"]
    if logprobs is not None:
        for name in whole["logprobs"]:
            assert [item for choice in choices for item in choice["logprobs"][name]] == whole["logprobs"][name]
    if token_ids:
        assert [item for choice in choices for item in choice["token_ids"]] == whole["token_ids"]


@given(ids=IDS, stops=STOPS, group=st.integers(1, 9), logprobs=st.sampled_from([None, 0, 2]))
def test_chat_streamed_equals_whole(
    text: TextCodec, ids: list[int], stops: list[str], group: int, logprobs: int | None
) -> None:
    deltas, call = run(text, ids, stops, group, logprobs=logprobs)
    messages = [{"role": "user", "content": "x"}]
    body = ChatBody.model_validate(
        {"model": "m", "messages": messages, "logprobs": logprobs is not None, "stream": True}
    )
    writer = ChatWriter(body, [call], "m", text.tokenizer, "fp")
    whole = json.loads(writer.whole([joined(deltas)]))["choices"][0]
    events = writer.opening() + b"".join(writer.chunk(0, delta) for delta in deltas) + writer.closing()
    choices = [chunk["choices"][0] for chunk in parse(events)]
    assert choices[0]["delta"]["role"] == "assistant"
    assert "".join(choice["delta"].get("content", "") for choice in choices) == whole["message"]["content"]
    assert [choice["finish_reason"] for choice in choices[:-1]] == [None] * (len(choices) - 1)
    assert choices[-1]["finish_reason"] == whole["finish_reason"]
    if logprobs is not None:
        streamed = [entry for choice in choices if choice["logprobs"] for entry in choice["logprobs"]["content"]]
        assert streamed == whole["logprobs"]["content"]


def test_minus_infinity_is_valid_json(http: httpx.Client, engine: FakeEngine) -> None:

    never = TokenLogprob(40, float("-inf"), ((41, float("-inf")),))
    engine.script = lambda request: [TokenEvent(request.request_id, (40,), (never,), finish_reason="length")]
    body = {"model": "test-model", "prompt": "x", "logprobs": 1, "max_tokens": 1}
    reply = http.post("/v1/completions", json=body)
    assert json.loads(reply.text, parse_constant=lambda name: pytest_fail(name))["choices"][0]["logprobs"][
        "token_logprobs"
    ] == [-9999.0]


def pytest_fail(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")
