"""Requests that are wrong: each gets a 4xx that names the field, and the server goes on."""

from __future__ import annotations

import gzip
import json
from typing import Any

import httpx
import pytest

from divisi.deploy.api.schema.replies import ErrorBody
from tests.deploy.api.fake_engine import FakeEngine

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
ASK = [{"role": "user", "content": "hi"}]
JSON = {"content-type": "application/json"}


def chat(**fields: Any) -> tuple[str, dict[str, Any]]:
    return CHAT, {"model": "test-model", "messages": ASK, **fields}


def completion(**fields: Any) -> tuple[str, dict[str, Any]]:
    return TEXT, {"model": "test-model", "prompt": "hi", **fields}


def tokenize(**fields: Any) -> tuple[str, dict[str, Any]]:
    return "/tokenize", {"messages": ASK, **fields}


def nested(depth: int) -> list[Any]:
    return [nested(depth - 1)] if depth else []


# (path and body, status, the error's param, words that its message must have)
TOKENIZE, DETOKENIZE = "/tokenize", "/detokenize"


def json_schema(schema: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    return chat(response_format={"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}})


FIELDS: list[tuple[tuple[str, dict[str, Any]], int, str | None, str]] = [
    (chat(messages=[]), 400, "messages", "must have at least 1 item, but has 0"),
    (chat(max_completion_tokens=100_000), 400, "max_completion_tokens", "this model's maximum context length"),
    (completion(prompt=[1] * 60_000), 400, "prompt", "the prompt alone has 60000"),
    (chat(messages="hi"), 400, "messages", "list"),
    (chat(messages=None), 400, "messages", "null"),
    (chat(messages=[1]), 400, "messages[0]", "object"),
    (chat(messages=[{"role": "user"}]), 400, "messages[0].content", "required"),
    (chat(messages=[{"role": "user", "content": None}]), 400, "messages[0].content", "string or a list of text parts"),
    (chat(messages=[{"role": "user", "content": 5}]), 400, "messages[0].content", "5"),
    (chat(messages=[{"role": "user", "content": []}]), 400, "messages[0].content", "at least 1"),
    (chat(messages=[{"role": "king", "content": "x"}]), 400, "messages[0].role", "'user'"),
    (chat(messages=[{"role": "tool", "content": "x"}]), 400, "messages[0].tool_call_id", "required"),
    (chat(messages=[{"role": 5, "content": "x"}]), 400, "messages[0].role", "but it is 5"),
    (chat(messages=[{"content": "x"}]), 400, "messages[0].role", "required"),
    (chat(messages=[{"role": "function", "content": "x"}]), 400, "messages[0].name", "required"),
    (
        chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
        400,
        "messages[0].content[0].type",
        "'text'",
    ),
    (
        chat(messages=[{"role": "user", "content": [{"type": "text", "text": 1}]}]),
        400,
        "messages[0].content[0].text",
        "string",
    ),
    (
        chat(messages=[{"role": "assistant", "content": "x", "tool_calls": [{}]}]),
        400,
        "messages[0].tool_calls[0].id",
        "required",
    ),
    (chat(messages=[{"role": "user", "content": "long " * 2000}]), 400, "messages", "512 tokens"),
    (chat(model=None), 400, "model", "null"),
    (chat(model=7), 400, "model", "7"),
    (chat(model="gpt-5"), 404, "model", "'gpt-5' does not exist"),
    ((CHAT, {"messages": ASK}), 400, "model", "required"),
    ((TEXT, {"model": "test-model"}), 400, "prompt", "required"),
    (chat(temperature=-0.1), 400, "temperature", "greater than or equal to 0"),
    (chat(temperature=2.1), 400, "temperature", "less than or equal to 2, but it is 2.1"),
    (chat(temperature="hot"), 400, "temperature", "'hot'"),
    (chat(temperature=True), 400, "temperature", "true"),
    (chat(top_p=0), 400, "top_p", "greater than 0"),
    (chat(top_p=1.5), 400, "top_p", "1.5"),
    (chat(top_k=-2), 400, "top_k", "-1"),
    (chat(top_k=1.5), 400, "top_k", "integer"),
    (chat(seed=2**63), 400, "seed", "less than"),
    (chat(seed="x"), 400, "seed", "integer"),
    (chat(max_tokens=0), 400, "max_tokens", "greater than or equal to 1"),
    (chat(max_tokens=-5), 400, "max_tokens", "-5"),
    (chat(max_tokens=10**400), 400, "max_tokens", "a huge integer"),
    (chat(max_tokens=1000), 400, "max_tokens", "at most"),
    (chat(max_completion_tokens="many"), 400, "max_completion_tokens", "integer"),
    (chat(n=0), 400, "n", "greater than or equal to 1"),
    (chat(n=17), 400, "n", "at most 16"),
    (chat(n=True), 400, "n", "integer"),
    (chat(min_p=1.5), 400, "min_p", "1.5"),
    (chat(repetition_penalty=0), 400, "repetition_penalty", "0.01"),
    (chat(repetition_penalty=5e-324), 400, "repetition_penalty", "0.01"),
    (chat(presence_penalty=2.5), 400, "presence_penalty", "2.5"),
    (chat(frequency_penalty="x"), 400, "frequency_penalty", "number"),
    (chat(logit_bias={"x": 1}), 400, "logit_bias.x", "pattern"),
    (chat(logit_bias={"5": 101}), 400, "logit_bias.5", "101"),
    (chat(logit_bias={"5": 1, "05": 2}), 400, "logit_bias", "twice"),
    (chat(logit_bias={"5000": 1}), 400, "logit_bias", "outside the vocabulary of 600"),
    (chat(allowed_token_ids=[]), 400, "allowed_token_ids", "at least 1"),
    (chat(allowed_token_ids=[600]), 400, "allowed_token_ids", "outside the vocabulary of 600"),
    (chat(bad_words=[""]), 400, "bad_words[0]", "at least 1"),
    (chat(bad_words="word"), 400, "bad_words", "list"),
    (chat(min_tokens=9, max_tokens=8), 400, "min_tokens", "more than the 8"),
    (chat(prompt_logprobs=21), 400, "prompt_logprobs", "limit of 20"),
    (chat(prompt_logprobs=1, stream=True), 400, "prompt_logprobs", "streamed"),
    (chat(truncate_prompt_tokens=0), 400, "messages", "no tokens"),
    (chat(continue_final_message=True, add_generation_prompt=True), 400, "continue_final_message", "both"),
    (chat(stop=[]), 200, None, ""),
    (chat(stop=""), 400, "stop", "at least 1"),
    (chat(stop=["a"] * 17), 400, "stop", "at most 16"),
    (chat(stop=["a", 1]), 400, "stop[1]", "string"),
    (chat(stop={"a": 1}), 400, "stop", "string or a list"),
    (chat(stop="x" * 600), 400, "stop", "has 600"),
    (chat(stop_token_ids=["a"]), 400, "stop_token_ids[0]", "integer"),
    (chat(stop_token_ids=[-1]), 400, "stop_token_ids[0]", "-1"),
    (chat(stream="yes"), 400, "stream", "boolean"),
    (chat(stream_options={"include_usage": True}), 400, "stream_options", "stream: true"),
    (chat(stream=True, stream_options={"usage": True}), 400, "stream_options.usage", "not supported"),
    (chat(logprobs=5), 400, "logprobs", "boolean"),
    (chat(top_logprobs=2), 400, "top_logprobs", "logprobs: true"),
    (chat(logprobs=True, top_logprobs=21), 400, "top_logprobs", "limit of 20"),
    (chat(chat_template_kwargs={"messages": []}), 400, "chat_template_kwargs", "messages"),
    (chat(chat_template_kwargs={"a": {"b": 1}}), 400, "chat_template_kwargs", "a must be"),
    (chat(chat_template_kwargs=[1]), 400, "chat_template_kwargs", "JSON object"),
    (tokenize(chat_template_kwargs={"messages": []}), 400, "chat_template_kwargs", "messages"),
    (tokenize(chat_template_kwargs={"self": 1}), 400, "chat_template_kwargs", "self"),
    (tokenize(chat_template_kwargs={"max_chars": 1}), 400, "chat_template_kwargs", "max_chars"),
    (chat(tools=[{"type": "function"}]), 400, "tools[0].function", "required"),
    (chat(response_format={"type": "xml"}), 400, "response_format", "json_object"),
    (chat(response_format={"type": "json_schema"}), 400, "response_format.json_schema", "required"),
    (json_schema({"type": "array", "uniqueItems": True}), 400, "response_format", "'uniqueItems' is not supported"),
    (json_schema({"properties": {"a": {"not": {}}}}), 400, "response_format", "$.properties.a: the keyword 'not'"),
    (json_schema({"type": "string", "maxLength": 10**7}), 400, "response_format", "limit of 10000"),
    (json_schema({"enum": [str(i) for i in range(5000)]}), 400, "response_format", "more than 4096"),
    (json_schema({"enum": [nested(180)]}), 400, "response_format", "recursion limit"),
    (json_schema({"description": "x" * 70_000}), 400, "response_format", "at most 65536"),
    (json_schema({"$ref": "#/$defs/a"}), 400, "response_format", "does not exist"),
    (json_schema({"$ref": "http://a/b"}), 400, "response_format", "outside the schema"),
    (json_schema({"type": "colour"}), 400, "response_format", "colour"),
    (chat(structured_outputs={}), 400, "structured_outputs", "exactly one"),
    (chat(structured_outputs={"regex": "a", "choice": ["b"]}), 400, "structured_outputs", "got regex, choice"),
    (chat(structured_outputs={"regex": "("}), 400, "structured_outputs", "unclosed group"),
    (chat(structured_outputs={"choice": []}), 400, "structured_outputs.choice", "at least 1"),
    (chat(structured_outputs={"grammar": "start: nothing"}), 400, "structured_outputs", "unknown name"),
    (chat(structured_outputs={"grammar": "start: /(a{1000}){1000}/"}), 400, "structured_outputs", "1000000 parts"),
    (chat(structured_outputs={"regex": "(?ix)#[\n(a{1000}){1000}"}), 400, "structured_outputs", "flag x"),
    (
        chat(structured_outputs={"json": {"patternProperties": {"(a{1000}){1000}": {}}}}),
        400,
        "structured_outputs",
        "$.patternProperties: the expression has 1000000 parts",
    ),
    (
        chat(structured_outputs={"regex": "a"}, response_format={"type": "json_object"}),
        400,
        "structured_outputs",
        "both",
    ),
    (chat(store=True), 400, "store", "supported"),
    (chat(guided_json={}), 400, "guided_json", "not supported"),
    (chat(prompt="x"), 400, "prompt", "not supported by this endpoint"),
    (chat(temprature=1), 400, "temprature", "did you mean temperature?"),
    (chat(**{"x" * 5000: 1}), 400, "x" * 64, "not a known field"),
    (completion(prompt=""), 400, "prompt", "no tokens"),
    (completion(prompt=[]), 400, "prompt", "at least 1"),
    (completion(prompt=[""]), 400, "prompt", "no tokens"),
    (completion(prompt=[[]]), 400, "prompt[0]", "at least 1"),
    (completion(prompt={"a": 1}), 400, "prompt", "list of token ids"),
    (completion(prompt=[1, "a"]), 400, "prompt[1]", "integer"),
    (completion(prompt=["a", 1]), 400, "prompt[1]", "string"),
    (completion(prompt=[1, -1]), 400, "prompt[1]", "-1"),
    (completion(prompt=[1.5]), 400, "prompt", "a string"),
    (completion(prompt=[10**30]), 400, "prompt[0]", "huge"),
    (completion(prompt=[1, 100_000]), 400, "prompt", "outside the vocabulary of 600"),
    (completion(prompt=[5] * 600), 400, "prompt", "prompt alone has 600"),
    (completion(prompt=["a"] * 9), 400, "prompt", "at most 8"),
    (completion(prompt=["a", [5]]), 400, "prompt[1]", "string"),
    (completion(prompt="x " * 90_000), 400, "prompt", "cannot fit"),
    (completion(max_tokens=0), 400, "max_tokens", "echo"),
    (completion(logprobs=True), 400, "logprobs", "integer"),
    (completion(logprobs=-1), 400, "logprobs", "-1"),
    (completion(logprobs=50), 400, "logprobs", "limit of 20"),
    (completion(echo="yes"), 400, "echo", "boolean"),
    (completion(suffix="end"), 400, "suffix", "supported"),
    (completion(best_of=17), 400, "best_of", "at most 16"),
    (completion(best_of=1, n=2), 400, "best_of", "n or more"),
    (completion(best_of=2, stream=True), 400, "best_of", "stream: false"),
    (completion(prompt=["a"] * 3, n=3), 400, "prompt", "at most 8"),
    (chat(best_of=2), 400, "best_of", "not supported by this endpoint"),
    ((TOKENIZE, {}), 400, "prompt", "either prompt or messages"),
    ((TOKENIZE, {"prompt": "a", "messages": ASK}), 400, "prompt", "either prompt or messages"),
    ((TOKENIZE, {"prompt": "a", "model": "gpt-5"}), 404, "model", "does not exist"),
    ((DETOKENIZE, {"tokens": [700]}), 400, "tokens", "outside the vocabulary"),
    ((DETOKENIZE, {"tokens": "a"}), 400, "tokens", "list"),
    (completion(messages=ASK), 400, "messages", "not supported by this endpoint"),
]

BODIES: list[tuple[bytes, dict[str, str], int, str]] = [
    (b"", JSON, 400, "not valid JSON"),
    (b"{", JSON, 400, "not valid JSON"),
    (b'{"model": "test-model",}', JSON, 400, "not valid JSON"),
    (b"null", JSON, 400, "must be a JSON object, not null"),
    (b"[1, 2]", JSON, 400, "a list of 2"),
    (b'"text"', JSON, 400, "JSON object"),
    (b"[" * 100_000, JSON, 400, "recursion"),
    (b'{"a":' * 20_000, JSON, 400, "recursion"),
    (b'{"model": "\xff\xfe"}', JSON, 400, "unicode"),
    (b'{"model": "\\ud800', JSON, 400, "not valid JSON"),
    (b'{"model": "\\ud8"}', JSON, 400, "not valid JSON"),
    (b'{"temperature": NaN}', JSON, 400, "not valid JSON"),
    (b'{"temperature": Infinity}', JSON, 400, "not valid JSON"),
    (b'{"model":"test-model","prompt":"x","temperature":1e999}', JSON, 400, "temperature"),
    (b'{"model":"test-model","prompt":"x","max_tokens":1e999}', JSON, 400, "max_tokens"),
    (b'{"model":"test-model","prompt":"x","seed":' + b"9" * 100_000 + b"}", JSON, 400, "number out of range"),
    (b'{"a": 1} trailing', JSON, 400, "trailing"),
    (b"\x00\x01\x02", JSON, 400, "not valid JSON"),
    (b"{}", {"content-type": "text/plain"}, 415, "application/json"),
    (b"prompt=x", {"content-type": "application/x-www-form-urlencoded"}, 415, "application/json"),
    (b"{}", {}, 415, "missing"),
    (b"{}", {**JSON, "content-encoding": "br"}, 415, "in one layer of gzip"),
    (b"{}", {**JSON, "content-encoding": "gzip, gzip"}, 415, "in one layer of gzip"),
    (b"{}", {**JSON, "content-encoding": "gzip"}, 400, "not what gzip makes"),
    (gzip.compress(b"{}")[:-4], {**JSON, "content-encoding": "gzip"}, 400, "its end is missing"),
    (gzip.compress(b"{}") + b"more", {**JSON, "content-encoding": "gzip"}, 400, "not what gzip makes"),
    (b"", {**JSON, "content-encoding": "gzip"}, 400, "its end is missing"),
    (gzip.compress(b"x" * 10_000_000), {**JSON, "content-encoding": "gzip"}, 413, "200000"),
    (b'{"prompt": "' + b"x" * 300_000 + b'"}', JSON, 413, "200000"),
]


def _assert_serves(http: httpx.Client) -> None:
    assert http.post(TEXT, json={"model": "test-model", "prompt": "x"}).status_code == 200


def _names(values: list[Any]) -> list[str]:
    return [f"{index}" for index in range(len(values))]


@pytest.mark.parametrize(("sent", "status", "param", "words"), FIELDS, ids=_names(FIELDS))
def test_fields(
    http: httpx.Client, sent: tuple[str, dict[str, Any]], status: int, param: str | None, words: str
) -> None:
    reply = http.post(sent[0], content=json.dumps(sent[1]), headers=JSON)
    assert reply.status_code == status, reply.text
    if status != 200:
        error = ErrorBody.model_validate_json(reply.content, strict=True).error
        assert error.param == param, error
        assert words in error.message, error
        assert error.type == "invalid_request_error"
        assert len(error.message) < 500
    _assert_serves(http)


@pytest.mark.parametrize(("body", "headers", "status", "words"), BODIES, ids=_names(BODIES))
def test_bodies(http: httpx.Client, body: bytes, headers: dict[str, str], status: int, words: str) -> None:
    reply = http.post(TEXT, content=body, headers=headers)
    assert reply.status_code == status, reply.text
    error = ErrorBody.model_validate_json(reply.content, strict=True).error
    assert words in error.message, error
    _assert_serves(http)


def test_chunked_body_past_the_limit(http: httpx.Client) -> None:
    reply = http.post(TEXT, content=(b"x" * 1000 for _ in range(300)), headers=JSON)
    assert reply.status_code == 413
    _assert_serves(http)


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", CHAT, 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("GET", "/v1/nothing", 404, "path_not_found"),
        ("POST", "/", 405, "method_not_allowed"),
        ("POST", "/v2", 404, "path_not_found"),
        ("GET", "/v1/models/other", 404, "model_not_found"),
    ],
)
def test_paths(http: httpx.Client, method: str, path: str, status: int, code: str) -> None:
    reply = http.request(method, path)
    assert reply.status_code == status
    assert ErrorBody.model_validate_json(reply.content).error.code == code


@pytest.mark.parametrize(
    ("method", "path", "words"),
    [
        ("POST", "/chat/completions", ["'/chat/completions'", "did you mean /v1/chat/completions?"]),
        ("POST", "/v1/chat/completion", ["'/v1/chat/completion'", "did you mean /v1/chat/completions?"]),
        ("POST", "/v1/v1/chat/completions", ["did you mean /v1/chat/completions?"]),
        ("POST", "/v1/embeddings", ["'/v1/embeddings'"]),
        ("GET", "/" + "x" * 5000, ["'/" + "x" * 127 + "...'", "/docs"]),
        ("GET", CHAT, [f"'{CHAT}' doesn't take GET", "send POST"]),
    ],
)
def test_the_path_is_named(http: httpx.Client, method: str, path: str, words: list[str]) -> None:
    message = http.request(method, path).json()["error"]["message"]
    assert all(word in message for word in words), message
    assert len(message) < 300


def test_nothing_reaches_the_engine(http: httpx.Client, engine: FakeEngine) -> None:
    for sent, status, _, _ in FIELDS:
        if status != 200:
            http.post(sent[0], content=json.dumps(sent[1]), headers=JSON)
    assert engine.requests == []
