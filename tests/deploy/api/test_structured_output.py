"""Answers under a JSON schema, of a random checkpoint that would write nothing but noise: they parse and validate."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest

from divisi.deploy.api import ApiSettings
from divisi.model.random_checkpoint import write_random_checkpoint
from divisi.model.text import TextCodec
from tests.deploy.api.conftest import MODEL
from tests.deploy.api.fake_engine import serve
from tests.support.local_client import local_client
from tests.support.random_schemas import random_schema

MAX_TOKENS = 500


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    folder: Path = tmp_path_factory.mktemp("random")
    write_random_checkpoint(folder, seed=3)
    settings = ApiSettings(
        served_model_name=MODEL, max_model_len=2048, vocab_size=1280, model_dir=str(folder), max_prompts=16
    )
    with (
        local_client(folder) as engine,
        serve(engine, TextCodec.load(folder), settings) as url,
        httpx.Client(base_url=url, timeout=120) as http,
    ):
        yield http


def ask(http: httpx.Client, **fields: Any) -> list[tuple[str, str]]:
    """Text and finish reason of each choice, streamed or not."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": MAX_TOKENS, **fields}
    if not fields.get("stream"):
        reply = http.post("/v1/chat/completions", json=body)
        assert reply.status_code == 200, reply.text
        return [(choice["message"]["content"], choice["finish_reason"]) for choice in reply.json()["choices"]]
    texts = [""] * fields.get("n", 1)
    ends = [""] * len(texts)
    with http.stream("POST", "/v1/chat/completions", json=body) as reply:
        assert reply.status_code == 200, reply.read()
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    texts[choice["index"]] += choice["delta"].get("content") or ""
                    ends[choice["index"]] = choice["finish_reason"] or ends[choice["index"]]
    return list(zip(texts, ends, strict=True))


def check_schemas(http: httpx.Client, seeds: range) -> None:
    """Ask for all of them, eight at a time, so that schemas meet in one batch."""
    with ThreadPoolExecutor(8) as pool:
        finished = sum(pool.map(lambda seed: answer_keeps_to_schema(http, seed), seeds))
    assert finished >= 0.9 * len(seeds), f"only {finished} of {len(seeds)} answers came to an end"


def answer_keeps_to_schema(http: httpx.Client, seed: int) -> bool:
    """Whether the answer to schema number `seed` came to its end; fails where it doesn't validate."""
    schema = random_schema(seed)
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    ((text, reason),) = ask(http, response_format=form, stream=bool(seed % 2), seed=seed, temperature=1.0)
    assert reason in ("stop", "length"), f"schema {seed}: {reason}"
    if reason == "length":
        return False
    try:
        jsonschema.Draft202012Validator(schema).validate(json.loads(text))
    except (ValueError, jsonschema.ValidationError) as error:
        raise AssertionError(f"schema {seed}: {schema}\nanswer: {text}") from error
    return True


def test_answers_keep_to_their_schemas(served: httpx.Client) -> None:
    check_schemas(served, range(16))


@pytest.mark.verify
def test_200_schemas(served: httpx.Client) -> None:
    check_schemas(served, range(200))


def test_expressions_choices_and_grammars(served: httpx.Client) -> None:
    for stream in (False, True):
        for text, _ in ask(served, structured_outputs={"regex": "[a-f]{3}-[0-9]+z"}, n=3, stream=stream):
            assert re.fullmatch("[a-f]{3}-[0-9]+z", text), text
        choices = ["yes", 'n"o', "müsli"]
        for text, reason in ask(served, structured_outputs={"choice": choices}, n=3, stream=stream):
            assert (text in choices, reason) == (True, "stop")
        for text, _ in ask(served, structured_outputs={"grammar": 'start: "x" ("," "x")* "."'}, n=2, stream=stream):
            assert re.fullmatch(r"x(,x)*\.", text), text


def test_free_answers_beside_them_are_as_alone(served: httpx.Client) -> None:
    free = ask(served, seed=5, max_tokens=40)
    mixed = ask(served, seed=5, max_tokens=40, structured_outputs={"regex": "[a-z ]{39,}"}, n=2)
    assert mixed[0] != free[0]
    assert ask(served, seed=5, max_tokens=40) == free


def test_a_schema_of_a_pathological_size_is_refused_at_once(served: httpx.Client) -> None:
    level: dict[str, Any] = {"type": "string"}
    for _ in range(12):
        level = {"type": "object", "properties": {"a": level, "b": level}}
    deep = {"type": "json_schema", "json_schema": {"name": "deep", "schema": level}}
    regex = "((((a{1,100}){1,100}){1,100}){1,100}){1,100}"
    for fields in ({"response_format": deep}, {"structured_outputs": {"regex": regex}}):
        body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], **fields}
        reply = served.post("/v1/chat/completions", json=body)
        assert reply.status_code == 400, reply.text
        assert reply.elapsed.total_seconds() < 5
