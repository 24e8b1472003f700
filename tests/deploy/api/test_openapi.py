"""The OpenAPI document says what the server takes and answers."""

from __future__ import annotations

import json
from typing import Any

import httpx
import jsonschema
import pytest

from divisi.cluster.errors import StepAborted
from divisi.cluster.request import TokenEvent
from tests.deploy.api.conftest import MODEL
from tests.deploy.api.fake_engine import FakeEngine

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = 'So: <tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
COUNTED = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
WIDE = {"n": 2, "return_token_ids": True, "stream_options": {"include_usage": True}}


def endpoint(http: httpx.Client, path: str) -> Any:
    return http.get("/openapi.json").json()["paths"][path]["post"]


def events(http: httpx.Client, path: str, fields: dict[str, Any]) -> list[str]:
    """The data of each event of a stream, the last one aside."""
    asked = {"messages": [{"role": "user", "content": "Hi"}]} if path == CHAT else {"prompt": "Hi"}
    reply = http.post(path, json={"model": MODEL, "stream": True, **asked, **fields})
    assert reply.status_code == 200, reply.text
    return [event.removeprefix("data: ") for event in reply.text.removesuffix("\n\n").split("\n\n")]


def checked(http: httpx.Client, path: str, data: list[str]) -> None:
    """Each event is as the document says: its frame by its own schema, its JSON by the schema of the content."""
    event = endpoint(http, path)["responses"]["200"]["content"]["text/event-stream"]["itemSchema"]
    chunk, done = event["properties"]["data"]["anyOf"]
    for piece in data:
        jsonschema.validate({"data": piece}, event)
        if piece != done["const"]:
            jsonschema.validate(json.loads(piece), chunk["contentSchema"])


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (CHAT, {}),
        (CHAT, WIDE),
        (CHAT, COUNTED),
        (CHAT, {"logprobs": True, "top_logprobs": 2}),
        (CHAT, {"tools": [TOOL]}),
        (TEXT, {}),
        (TEXT, WIDE),
        (TEXT, COUNTED),
        (TEXT, {"logprobs": 2, "echo": True}),
    ],
)
def test_streamed_events(http: httpx.Client, engine: FakeEngine, path: str, fields: dict[str, Any]) -> None:
    engine.script = engine.say(CALL if "tools" in fields else "Hello, 你好!")
    data = events(http, path, fields)
    assert data[-1] == "[DONE]"
    assert len(data) > 4
    checked(http, path, data)
    assert ("tool_calls" in "".join(data)) == ("tools" in fields)


def test_streamed_failure(http: httpx.Client, engine: FakeEngine) -> None:
    engine.script = lambda request: [TokenEvent("r", (40,), None), StepAborted("gone")]
    for path in (CHAT, TEXT):
        data = events(http, path, {})
        assert "error" in json.loads(data[-1])
        checked(http, path, data)


@pytest.mark.parametrize(("biases", "taken"), [({"17": 1.5}, True), ({"a": 1.5}, False), ({"-1": 0}, False)])
def test_bias_keys(http: httpx.Client, biases: dict[str, float], taken: bool) -> None:
    body = {"model": MODEL, "prompt": "Hi", "logit_bias": biases}
    schema = endpoint(http, TEXT)["requestBody"]["content"]["application/json"]["schema"]
    assert jsonschema.Draft202012Validator(schema).is_valid(body) is taken
    assert http.post(TEXT, json=body).status_code == (200 if taken else 400)
