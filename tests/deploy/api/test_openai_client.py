"""The real `openai` client against the API over a socket."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest

from divisi.deploy.api.schema.replies import ChatCompletion, Completion
from tests.deploy.api.fake_engine import FakeEngine, events_of

MODEL = "test-model"
SAID = "Hello, world! 你好 👩‍🚀 naïve"
ASK: Any = [{"role": "user", "content": "Who are you?"}]


def test_chat(client: openai.OpenAI, engine: FakeEngine) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=ASK, seed=7, temperature=0.5, top_p=0.9)
    assert answer.choices[0].message.content == SAID
    assert answer.choices[0].finish_reason == "stop"
    request = engine.requests[0]
    assert (request.sampling.seed, request.sampling.temperature, request.sampling.top_p) == (7, 0.5, 0.9)
    prompt = engine.tokenizer.decode(request.prompt, skip_special=False)
    assert prompt == "<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n"
    assert request.max_tokens == 512 - len(request.prompt)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(request.prompt)
    assert answer.usage.completion_tokens == len(engine.tokenizer.encode(SAID))


def test_chat_streamed(client: openai.OpenAI, engine: FakeEngine) -> None:
    stream = client.chat.completions.create(
        model=MODEL, messages=ASK, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == SAID
    assert [chunk.choices[0].finish_reason for chunk in chunks[-2:-1]] == ["stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(engine.tokenizer.encode(SAID))
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    assert not any("�" in (chunk.choices[0].delta.content or "") for chunk in chunks[:-1])


def test_chat_stream_helper(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model=MODEL, messages=ASK, logprobs=True, top_logprobs=2) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    assert final.choices[0].message.content == SAID


async def test_async_client(engine: FakeEngine, url: str) -> None:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        answer = await client.chat.completions.create(model=MODEL, messages=ASK)
        assert answer.choices[0].message.content == SAID
        stream = await client.completions.create(model=MODEL, prompt="x", stream=True, max_tokens=500)
        assert "".join([chunk.choices[0].text async for chunk in stream]) == SAID


def test_completion_kinds_of_prompts(client: openai.OpenAI, engine: FakeEngine) -> None:
    ids = engine.tokenizer.encode("one two")
    for prompt, prompts in (("one two", 1), (["one two"], 1), (ids, 1), ([ids, ids], 2), (["one two"] * 3, 3)):
        engine.requests.clear()
        answer = client.completions.create(model=MODEL, prompt=prompt, max_tokens=4)
        assert [choice.index for choice in answer.choices] == list(range(prompts))
        assert {choice.finish_reason for choice in answer.choices} == {"length"}
        assert [request.prompt for request in engine.requests] == [tuple(ids)] * prompts
        assert len({request.request_id for request in engine.requests}) == prompts
    assert engine.requests[0].max_tokens == 4


def test_completion_default_of_16_tokens(client: openai.OpenAI, engine: FakeEngine) -> None:
    client.completions.create(model=MODEL, prompt="x")
    assert engine.requests[0].max_tokens == 16


def test_several_prompts_streamed(client: openai.OpenAI, engine: FakeEngine) -> None:
    answers = {len(engine.tokenizer.encode(prompt)): f"for {prompt}" for prompt in ("a", "b b", "c c c c")}
    engine.script = lambda request: events_of(request, engine.tokenizer.encode(answers[len(request.prompt)]))
    texts = ["", "", ""]
    prompts = ["a", "b b", "c c c c"]
    for chunk in client.completions.create(model=MODEL, prompt=prompts, stream=True, max_tokens=99):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [f"for {prompt}" for prompt in prompts]


def test_missing_seed_is_drawn(client: openai.OpenAI, engine: FakeEngine) -> None:
    for _ in range(2):
        client.completions.create(model=MODEL, prompt="x")
    assert engine.requests[0].sampling.seed != engine.requests[1].sampling.seed


@pytest.mark.parametrize("stream", [False, True])
def test_stop_string_truncates_and_cancels(client: openai.OpenAI, engine: FakeEngine, stream: bool) -> None:
    engine.script = engine.say("one two STOP three", group=3)
    answer: Any = client.completions.create(
        model=MODEL, prompt="x", stop=[" STOP", "never"], max_tokens=99, stream=stream
    )
    choices = [chunk.choices[0] for chunk in answer] if stream else [answer.choices[0]]
    assert "".join(choice.text for choice in choices) == "one two"
    assert choices[-1].finish_reason == "stop"
    assert choices[-1].stop_reason == " STOP"
    assert engine.closed.wait(5)


def test_stop_ids(client: openai.OpenAI, engine: FakeEngine) -> None:
    extra = {"stop_token_ids": [5, 6]}
    answer: Any = client.completions.create(model=MODEL, prompt="x", extra_body=extra, max_tokens=99)
    eos = engine.tokenizer.id_of("<|im_end|>")
    assert eos is not None
    assert (engine.requests[0].stop_ids, engine.requests[0].content_stop_ids) == ({eos}, {5, 6})
    assert answer.choices[0].stop_reason == 5
    client.completions.create(model=MODEL, prompt="x", extra_body={**extra, "ignore_eos": True})
    assert (engine.requests[1].stop_ids, engine.requests[1].content_stop_ids) == (frozenset(), {5, 6})


def test_echo_and_logprobs(client: openai.OpenAI, engine: FakeEngine) -> None:
    prompt = "Zwölf 你"
    answer = client.completions.create(model=MODEL, prompt=prompt, echo=True, logprobs=2, max_tokens=3)
    choice = answer.choices[0]
    ids = engine.tokenizer.encode(prompt)
    assert choice.text.startswith(prompt)
    found = choice.logprobs
    assert found is not None
    assert found.tokens is not None
    assert found.text_offset is not None
    assert found.token_logprobs is not None
    assert found.top_logprobs is not None
    assert len(found.tokens) == len(found.text_offset) == len(found.token_logprobs) == len(ids) + 3
    assert found.token_logprobs[0] is None
    assert found.top_logprobs[0] is None
    assert all(entry is not None and len(entry) == 2 for entry in found.top_logprobs[1:])
    offset = 0
    for token, start in zip(found.tokens, found.text_offset, strict=True):
        if not token.startswith("bytes:"):
            assert choice.text[start : start + len(token)] == token
        assert start >= offset
        offset = start
    assert any(token.startswith("bytes:\\x") for token in found.tokens)


def test_prompt_only(client: openai.OpenAI, engine: FakeEngine) -> None:
    answer = client.completions.create(model=MODEL, prompt="score me", echo=True, logprobs=1, max_tokens=0)
    assert answer.choices[0].text == "score me"
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].logprobs is not None
    assert len(answer.choices[0].logprobs.tokens or []) == len(engine.requests[0].prompt)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 0
    plain = client.completions.create(model=MODEL, prompt="score me", echo=True, max_tokens=0)
    assert plain.choices[0].text == "score me"
    assert plain.choices[0].logprobs is None


def test_chat_logprobs(client: openai.OpenAI, engine: FakeEngine) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=ASK, logprobs=True, top_logprobs=2)
    found = answer.choices[0].logprobs
    assert found is not None
    assert found.content is not None
    raw = b"".join(bytes(entry.bytes or []) for entry in found.content)
    assert raw.decode() == SAID
    assert all(len(entry.top_logprobs) == 2 for entry in found.content)
    streamed = client.chat.completions.create(model=MODEL, messages=ASK, logprobs=True, top_logprobs=2, stream=True)
    entries = [entry for chunk in streamed if (lp := chunk.choices[0].logprobs) for entry in lp.content or []]
    assert entries == found.content


def test_replies_are_as_documented(http: httpx.Client) -> None:
    body = {"model": MODEL, "max_tokens": 5, "return_token_ids": True}
    chat = http.post("/v1/chat/completions", json={**body, "messages": ASK, "logprobs": True, "top_logprobs": 1})
    parsed = ChatCompletion.model_validate_json(chat.content, strict=True)
    assert len(parsed.choices[0].token_ids or []) == 5
    assert parsed.prompt_token_ids
    completion = http.post("/v1/completions", json={**body, "prompt": ["a", "b"], "logprobs": 1, "echo": True})
    both = Completion.model_validate_json(completion.content, strict=True)
    assert all(choice.prompt_token_ids and len(choice.token_ids or []) == 5 for choice in both.choices)
    plain = http.post("/v1/completions", json={"model": MODEL, "prompt": "a"}).json()
    assert "token_ids" not in plain["choices"][0]


def test_streamed_token_ids(client: openai.OpenAI, engine: FakeEngine) -> None:
    extra = {"return_token_ids": True}
    stream: Any = client.chat.completions.create(model=MODEL, messages=ASK, stream=True, extra_body=extra)
    chunks = list(stream)
    assert chunks[0].prompt_token_ids == list(engine.requests[0].prompt)
    ids = [token for chunk in chunks for token in getattr(chunk.choices[0], "token_ids", None) or []]
    assert ids == engine.tokenizer.encode(SAID)


def test_content_parts_and_harmless_fields(client: openai.OpenAI, engine: FakeEngine) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages: Any = [{"role": "developer", "content": "be kind"}, {"role": "user", "content": parts}]
    client.chat.completions.create(
        model=MODEL,
        messages=messages,
        user="me",
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
        safety_identifier="x",
        prompt_cache_key="y",
        n=1,
        presence_penalty=0,
        tools=[],
        extra_body={"chat_template_kwargs": {"enable_thinking": False}},
    )
    prompt = engine.tokenizer.decode(engine.requests[0].prompt, skip_special=False)
    assert "<|im_start|>system\nbe kind<|im_end|>" in prompt
    assert "<|im_start|>user\none\ntwo<|im_end|>" in prompt


def test_conversation_goes_on_with_the_answer_as_it_came(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=ASK)
    messages: Any = [*ASK, answer.choices[0].message, *ASK]
    client.chat.completions.create(model=MODEL, messages=messages)


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_openapi_document(http: httpx.Client) -> None:
    document = http.get("/openapi.json").json()
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/metrics"} <= set(document["paths"])
    body = document["paths"]["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["additionalProperties"] is False
    assert "$ref" not in str(body)
