"""Answers whose grammar has the letters of added tokens in it: complete, valid, and the same streamed and whole."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from random import Random
from typing import Any, NamedTuple

import httpx
import jsonschema
import pytest

from divisi.deploy.api import ApiSettings
from divisi.model.demo import checkpoint_dir
from divisi.model.text import TextCodec
from tests.deploy.api.conftest import MODEL
from tests.deploy.api.fake_engine import serve
from tests.support.local_client import local_client

TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>", "<tool_response>",
    "</tool_response>", "<think>", "</think>",
)  # fmt: skip
WITH_TOOLS = 5
"""Every so many schemas have tools beside them."""


class Reply(NamedTuple):
    """What a client has in the end."""

    content: str
    calls: list[tuple[str, str]]
    finish_reason: str


@pytest.fixture(scope="module")
def served() -> Iterator[httpx.Client]:
    folder = checkpoint_dir()
    settings = ApiSettings(served_model_name=MODEL, max_model_len=2048, vocab_size=768, model_dir=str(folder))
    with (
        local_client(folder) as engine,
        serve(engine, TextCodec.load(folder), settings) as url,
        httpx.Client(base_url=url, timeout=120) as http,
    ):
        yield http


def schema_of(seed: int) -> dict[str, Any]:
    """An object whose names and values have a token's letters at the beginning, inside, at the end, or twice."""
    random, token = Random(seed), TOKENS[seed % len(TOKENS)]
    texts = [token, f"a{token}", f"{token}b", f"see {token} and {token}.", f'"{token}\\', f"é{token}你"]
    properties: dict[str, Any] = {"first": {"const": random.choice(texts)}}
    if random.random() < 0.5:
        properties[f"k{token}"] = {"enum": random.sample(texts, 3)}
    if random.random() < 0.5:
        properties["last"] = {"anyOf": [{"const": random.choice(texts)}, {"type": "boolean"}]}
    names = list(properties)
    return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}


def ask(http: httpx.Client, stream: bool, **fields: Any) -> Reply:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 400, **fields}
    if not stream:
        reply = http.post("/v1/chat/completions", json=body)
        assert reply.status_code == 200, reply.text
        choice = reply.json()["choices"][0]
        calls = [call["function"] for call in choice["message"].get("tool_calls") or []]
        found = [(call["name"], call["arguments"]) for call in calls]
        return Reply(choice["message"]["content"] or "", found, choice["finish_reason"])
    content, reason = "", ""
    pieces: dict[int, list[str]] = {}
    with http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as streamed:
        for line in streamed.iter_lines():
            if line.startswith("data: {"):
                choice = json.loads(line[6:])["choices"][0]
                content += choice["delta"].get("content") or ""
                reason = choice["finish_reason"] or reason
                for call in choice["delta"].get("tool_calls") or []:
                    name, arguments = call["function"].get("name") or "", call["function"].get("arguments") or ""
                    whole = pieces.setdefault(call["index"], ["", ""])
                    whole[0], whole[1] = whole[0] + name, whole[1] + arguments
    return Reply(content, [(name, arguments) for name, arguments in pieces.values()], reason)


def is_complete(http: httpx.Client, seed: int) -> bool:
    """Whether an answer came to its end; fails where one that says so doesn't validate."""
    schema = schema_of(seed)
    fields: dict[str, Any] = {
        "response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}},
        "chat_template_kwargs": {"enable_thinking": False},
        "temperature": 1.5,
        "seed": seed,
        "skip_special_tokens": seed % 3 != 0,
    }
    if seed % WITH_TOOLS == 0:
        function = {"name": "noted", "parameters": schema_of(seed + 1), "strict": True}
        fields["tools"] = [{"type": "function", "function": function}]
    whole, streamed = ask(http, False, **fields), ask(http, True, **fields)
    assert streamed == whole, f"schema {seed}"
    if whole.finish_reason == "length":
        return False
    texts = [(schema_of(seed + 1), arguments) for _, arguments in whole.calls] or [(schema, whole.content)]
    for wanted, text in texts:
        try:
            jsonschema.Draft202012Validator(wanted).validate(json.loads(text))
        except (ValueError, jsonschema.ValidationError) as error:
            raise AssertionError(f"schema {seed}: {wanted}\nanswer: {whole}") from error
    return True


def check(http: httpx.Client, seeds: range) -> None:
    with ThreadPoolExecutor(8) as pool:
        complete = sum(pool.map(lambda seed: is_complete(http, seed), seeds))
    assert complete >= 0.95 * len(seeds), f"only {complete} of {len(seeds)} answers came to an end"


def test_schemas_with_tokens_in_their_strings(served: httpx.Client) -> None:
    check(served, range(9))


@pytest.mark.verify
def test_200_schemas_with_tokens_in_their_strings(served: httpx.Client) -> None:
    check(served, range(200))


@pytest.mark.parametrize(
    ("form", "answers"),
    [
        ({"regex": "A <think>(b)</think> (yes|no)"}, ["A <think>b</think> yes", "A <think>b</think> no"]),
        ({"grammar": 'start: ("b" | "c") "<think><|im_end|>"'}, ["b<think><|im_end|>", "c<think><|im_end|>"]),
        ({"grammar": 'root ::= "A </think>" [bc]'}, ["A </think>b", "A </think>c"]),
        ({"choice": ["<think>", "</tool_call>"]}, ["<think>", "</tool_call>"]),
    ],
)  # fmt: skip
def test_other_forms(served: httpx.Client, form: dict[str, Any], answers: list[str]) -> None:
    """In the content, while the prompt has the thinking closed; and after a thinking of the answer's own."""
    for switch in ({"enable_thinking": False}, {}):
        fields = {"structured_outputs": form, "temperature": 1.0, "seed": 3, "chat_template_kwargs": switch}
        reply = ask(served, False, thinking_token_budget=20, **fields)
        assert reply.content in answers
        assert reply.finish_reason == "stop"
        assert ask(served, True, thinking_token_budget=20, **fields) == reply


def test_a_grammar_that_names_the_end_is_refused(served: httpx.Client) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
    reply = served.post(
        "/v1/chat/completions", json={**body, "structured_outputs": {"grammar": 'start: "a" <|im_end|> "b"'}}
    )
    assert reply.status_code == 400
    assert "ends an answer" in reply.json()["error"]["message"]


def test_an_answer_that_is_cut_says_so(served: httpx.Client) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema_of(2)}}
    fields = {"response_format": form, "chat_template_kwargs": {"enable_thinking": False}, "max_tokens": 8}
    for stream in (False, True):
        reply = ask(served, stream, **fields)
        assert reply.finish_reason == "length"
        assert '{"first": "'.startswith(reply.content[:11])
