"""Several answers to one prompt: n and best_of, whole and streamed."""

from __future__ import annotations

from collections.abc import Iterable

import httpx
import openai
import pytest

from divisi.cluster.request import Request, TokenEvent, TokenLogprob
from tests.deploy.api.conftest import MODEL
from tests.deploy.api.fake_engine import FakeEngine, Step, events_of

WORDS = ("alpha", "beta", "gamma", "delta")


def one_word_each(engine: FakeEngine) -> None:
    """Choice i, told apart by the end of its request's id, says word i; later words are likelier."""

    def script(request: Request) -> Iterable[Step]:
        index = int(request.request_id.rpartition("-")[2])
        ids = engine.tokenizer.encode(WORDS[index])
        if request.logprobs is None:
            return events_of(request, ids)
        told = tuple(TokenLogprob(token, index - 9.0, ()) for token in ids)
        return [TokenEvent(request.request_id, tuple(ids), told, finish_reason="stop")]

    engine.script = script


@pytest.mark.parametrize("stream", [False, True])
def test_chat_choices(client: openai.OpenAI, engine: FakeEngine, stream: bool) -> None:
    one_word_each(engine)
    messages = [{"role": "user", "content": "x"}]
    texts = ["", "", ""]
    ends = []
    if stream:
        for chunk in client.chat.completions.create(model=MODEL, messages=messages, n=3, seed=5, stream=True):  # type: ignore[arg-type]
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
                ends += [choice.index] if choice.finish_reason == "stop" else []
    else:
        answer = client.chat.completions.create(model=MODEL, messages=messages, n=3, seed=5)  # type: ignore[arg-type]
        for choice in answer.choices:
            texts[choice.index] = choice.message.content or ""
            ends += [choice.index] if choice.finish_reason == "stop" else []
    assert texts == list(WORDS[:3])
    assert sorted(ends) == [0, 1, 2]
    seeds = [request.sampling.seed for request in engine.requests]
    assert seeds[0] == 5
    assert len(set(seeds)) == 3


def test_completion_choices_stand_by_their_prompts(client: openai.OpenAI, engine: FakeEngine) -> None:
    one_word_each(engine)
    answer = client.completions.create(model=MODEL, prompt=["a", "b"], n=2, seed=7)
    assert [choice.text for choice in answer.choices] == list(WORDS)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    seeds = [request.sampling.seed for request in engine.requests]
    assert seeds[:2] == seeds[2:], "the same prompt in another place would get another answer"
    prompts = sum(len(request.prompt) for request in engine.requests) // 2
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == prompts


def test_best_of_tells_the_likeliest(http: httpx.Client, engine: FakeEngine) -> None:
    one_word_each(engine)
    body = {"model": MODEL, "prompt": "a", "n": 2, "best_of": 4}
    reply = http.post("/v1/completions", json=body).json()
    assert [choice["text"] for choice in reply["choices"]] == ["delta", "gamma"]
    assert [choice["logprobs"] for choice in reply["choices"]] == [None, None]
    assert reply["usage"]["completion_tokens"] == sum(len(engine.tokenizer.encode(word)) for word in WORDS)


def test_usage_in_every_chunk(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.script = engine.say("one two three")
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(
        client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "x"}],
            stream=True,
            stream_options=options,  # type: ignore[arg-type]
        )
    )
    counts = [chunk.usage.completion_tokens for chunk in chunks if chunk.usage is not None]
    assert len(counts) == len(chunks)
    assert counts == sorted(counts)
    assert counts[-1] == len(engine.tokenizer.encode("one two three"))
