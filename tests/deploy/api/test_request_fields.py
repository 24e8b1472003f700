"""Fields of a request that change what the engine is asked, or how the answer is told."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from divisi.cluster.request import Request
from divisi.deploy.api.schema.replies import ChatCompletion, Completion
from tests.deploy.api.conftest import MODEL
from tests.deploy.api.fake_engine import FakeEngine

ASK = [{"role": "user", "content": "hi there"}]


def complete(http: httpx.Client, **fields: Any) -> dict[str, Any]:
    reply = http.post("/v1/completions", json={"model": MODEL, "prompt": "hi", **fields})
    assert reply.status_code == 200, reply.text
    Completion.model_validate_json(reply.content, strict=True)
    answer: dict[str, Any] = reply.json()
    return answer


def chat(http: httpx.Client, **fields: Any) -> dict[str, Any]:
    reply = http.post("/v1/chat/completions", json={"model": MODEL, "messages": ASK, **fields})
    assert reply.status_code == 200, reply.text
    ChatCompletion.model_validate_json(reply.content, strict=True)
    answer: dict[str, Any] = reply.json()
    return answer


def asked(engine: FakeEngine) -> Request:
    return engine.requests[-1]


def test_sampling_reaches_the_engine(http: httpx.Client, engine: FakeEngine) -> None:
    complete(
        http,
        temperature=0.5,
        top_k=-1,
        top_p=0.9,
        min_p=0.1,
        seed=-1,
        presence_penalty=0.25,
        frequency_penalty=-0.5,
        repetition_penalty=1.5,
        logit_bias={"7": -100, "5": 1.5},
        allowed_token_ids=[9, 5, 9],
        min_tokens=3,
        stop_token_ids=[11],
        ignore_eos=True,
    )
    sampling = asked(engine).sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == (0.5, 0, 0.9, 0.1)
    assert sampling.seed == 2**64 - 1
    penalties = (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty)
    assert penalties == (0.25, -0.5, 1.5)
    assert sampling.logit_bias == ((5, 1.5), (7, -100.0))
    assert sampling.allowed_token_ids == (5, 9)
    assert (asked(engine).min_tokens, asked(engine).content_stop_ids) == (3, frozenset({11}))


def test_bad_words_are_banned_at_the_start_and_after_a_blank(http: httpx.Client, engine: FakeEngine) -> None:
    complete(http, bad_words=["word", " word"])
    encode = engine.tokenizer.encode
    expected = {tuple(encode("word", add_special_tokens=False)), tuple(encode(" word", add_special_tokens=False))}
    assert set(asked(engine).sampling.bad_words) == expected


@pytest.mark.parametrize(("include", "told"), [(False, "one two"), (True, "one two three")])
def test_stop_string_in_the_output(http: httpx.Client, engine: FakeEngine, include: bool, told: str) -> None:
    engine.script = engine.say("one two three four")
    choice = complete(http, stop=" three", include_stop_str_in_output=include)["choices"][0]
    assert (choice["text"], choice["stop_reason"]) == (told, " three")


def test_a_named_stop_token_in_the_output(http: httpx.Client, engine: FakeEngine) -> None:
    stop = engine.tokenizer.encode("!")[0]
    engine.script = engine.say("one")
    fields = {"stop_token_ids": [stop], "ignore_eos": True}
    assert complete(http, **fields)["choices"][0]["text"] == "one"
    assert complete(http, include_stop_str_in_output=True, **fields)["choices"][0]["text"] == "one!"


def test_no_stop_string_within_the_first_tokens(http: httpx.Client, engine: FakeEngine) -> None:
    engine.script = engine.say("a a a a a")
    count = len(engine.tokenizer.encode("a a"))
    assert complete(http, stop="a")["choices"][0]["text"] == ""
    assert complete(http, stop="a", min_tokens=count)["choices"][0]["text"] == "a a "


def test_special_tokens_are_shown_where_asked(http: httpx.Client, engine: FakeEngine) -> None:
    engine.script = engine.say("a<|im_start|>b")
    assert complete(http)["choices"][0]["text"] == "ab"
    assert complete(http, skip_special_tokens=False)["choices"][0]["text"] == "a<|im_start|>b"


def test_prompt_logprobs(http: httpx.Client, engine: FakeEngine) -> None:
    told = complete(http, prompt="hi there", prompt_logprobs=2)["choices"][0]["prompt_logprobs"]
    prompt = asked(engine).prompt
    assert told[0] is None
    assert len(told) == len(prompt)
    for token, entry in zip(prompt[1:], told[1:], strict=True):
        assert list(entry) == [str(token), str(token + 1)]
        assert entry[str(token)] == {
            "logprob": -0.5,
            "rank": 1,
            "decoded_token": engine.tokenizer.name_of(token),
        }
    assert chat(http, prompt_logprobs=0)["prompt_logprobs"][0] is None
    assert "prompt_logprobs" not in chat(http)


def test_truncated_prompts_keep_their_end(http: httpx.Client, engine: FakeEngine) -> None:
    complete(http, prompt=list(range(1, 30)), truncate_prompt_tokens=4)
    assert asked(engine).prompt == (26, 27, 28, 29)
    complete(http, prompt=[5] * 600 + [6] * 512, truncate_prompt_tokens=-1, max_tokens=12)
    assert asked(engine).prompt == (6,) * 500


def test_continued_answers(http: httpx.Client, engine: FakeEngine) -> None:
    messages = [*ASK, {"role": "assistant", "content": "Once upon"}]
    chat(http, messages=messages, continue_final_message=True)
    assert engine.tokenizer.decode(asked(engine).prompt, skip_special=False).endswith("assistant\nOnce upon")
    chat(http, messages=messages, add_generation_prompt=False)
    assert engine.tokenizer.decode(asked(engine).prompt, skip_special=False).endswith("Once upon<|im_end|>\n")


def test_structure_reaches_the_engine(http: httpx.Client, engine: FakeEngine) -> None:
    for fields in (
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "integer"}}}},
        {"structured_outputs": {"json": {"type": "integer"}}},
        {"structured_outputs": {"regex": "[a-z]+"}},
        {"structured_outputs": {"choice": ["yes", 'n"o']}},
        {"structured_outputs": {"grammar": 'start: "a" start | "b"'}},
        {"structured_outputs": {"grammar": 'root ::= "a" | "b"'}},
        {"structured_outputs": {"json_object": True}},
    ):
        chat(http, **fields)
        assert asked(engine).grammar, fields
    chat(http, response_format={"type": "text"})
    assert asked(engine).grammar is None


def test_tokenize_and_back(http: httpx.Client, engine: FakeEngine) -> None:
    reply = http.post("/tokenize", json={"prompt": "naïve 你好<|im_end|>", "return_token_strs": True}).json()
    assert reply["tokens"] == engine.tokenizer.encode("naïve 你好<|im_end|>")
    assert (reply["count"], reply["max_model_len"]) == (len(reply["tokens"]), 512)
    assert reply["token_strs"][-1] == "<|im_end|>"
    back = http.post("/detokenize", json={"model": MODEL, "tokens": reply["tokens"]}).json()
    assert back == {"prompt": "naïve 你好<|im_end|>"}
    chat(http)
    conversation = http.post("/tokenize", json={"messages": ASK}).json()["tokens"]
    assert tuple(conversation) == asked(engine).prompt


def test_versions(http: httpx.Client) -> None:
    version = http.get("/version").json()["version"]
    assert http.get("/v1/version").json() == {"version": version}
    metadata = http.get("/v1/metadata").json()
    assert metadata["version"] == version
    assert metadata["modelInfo"][0]["shortName"] == MODEL


def test_request_ids(http: httpx.Client) -> None:
    path = "/v1/models"
    assert http.get(path, headers={"X-Request-Id": "mine-1"}).headers["x-request-id"] == "mine-1"
    made = {http.get(path).headers["x-request-id"] for _ in range(3)}
    assert len(made) == 3
    assert http.get("/nowhere", headers={"X-Request-Id": "mine-2"}).headers["x-request-id"] == "mine-2"
    refused = http.get(path, headers={"X-Request-Id": "x" * 129})
    assert refused.status_code == 400
    assert "X-Request-Id" in refused.json()["error"]["message"]
    assert refused.headers["x-request-id"] not in ("", "x" * 129)
