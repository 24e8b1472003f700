"""What programs read: errors that mappers know, headers, pages, names; and browsers' and proxies' ways to send."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from divisi.cluster.errors import Overloaded
from divisi.cluster.request import TokenEvent
from divisi.deploy.limits import KeyFile
from divisi.model.text import TextCodec
from tests.deploy.api.conftest import MODEL, SETTINGS
from tests.deploy.api.fake_engine import FakeEngine, serve

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
ASK: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
KEY = "sk-" + "k" * 40
PAGE = "https://chat.example.org"


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (CHAT, {"messages": [{"role": "user", "content": "long " * 2000}]}),
        (CHAT, {**ASK, "max_tokens": 512}),
        (CHAT, {**ASK, "max_completion_tokens": 100_000}),
        (CHAT, {"messages": [{"role": "user", "content": "x" * 150_000}]}),  # too long to be worth tokenising
        (TEXT, {"prompt": [5] * 600}),
        (TEXT, {"prompt": ["a", "long " * 2000]}),
    ],
)
def test_overlong_prompts_say_what_mappers_look_for(http: httpx.Client, path: str, fields: dict[str, Any]) -> None:
    error = http.post(path, json={"model": MODEL, **fields}).json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert "this model's maximum context length is 512 tokens" in error["message"]  # LiteLLM's
    assert "context_length_exceeded" in error["message"]  # LangChain's


def test_the_operators_limit_on_prompts_says_it_too(text: TextCodec) -> None:
    settings = SETTINGS.model_copy(update={"max_prompt_tokens": 8})
    with serve(FakeEngine(text.tokenizer), text, settings) as url:
        error = httpx.post(url + CHAT, json=ASK).json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert "this model's maximum context length is 8 tokens for a prompt" in error["message"]


def formatted(*formats: str, **more: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {f"p{i}": {"type": "string", "format": f} for i, f in enumerate(formats)},
    } | more


def schema_fields(schema: Any) -> list[dict[str, Any]]:
    """The ways to ask for a schema."""
    function = {"name": "f", "parameters": schema}
    return [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}},
        {"structured_outputs": {"json": schema}},
        {"tools": [{"type": "function", "function": {**function, "strict": True}}]},
        {"tools": [{"type": "function", "function": function}], "tool_choice": "required"},
    ]


@pytest.mark.parametrize(
    ("schema", "told"),
    [
        (formatted("password", "binary", "path", "byte"), "binary, byte, password, path"),
        (formatted("date-time", "uuid", "email"), None),
        (formatted("file-path", "date", "json-string"), "file-path, json-string"),
        ({"type": "object", "properties": {"n": {"type": "integer", "format": "int64"}}}, "int64"),
        ({"type": "object", "properties": {"n": {"anyOf": [{"type": "string", "format": "regex"}]}}}, "regex"),
        ({"type": "object", "$defs": {"a": {"type": "string", "format": "jwt"}}, "properties": {}}, "jwt"),
        # a name, a value: no keyword
        ({"type": "object", "properties": {"format": {"enum": [{"format": "password"}], "default": 1}}}, None),
        ({"type": "object", "properties": {"n": {"type": "integer", "format": "epoch"}}}, None),
    ],
)
def test_formats_that_no_grammar_enforces(
    http: httpx.Client, engine: FakeEngine, schema: dict[str, Any], told: str | None
) -> None:
    for fields in schema_fields(schema):
        for stream in (False, True):
            reply = http.post(CHAT, json={**ASK, **fields, "stream": stream})
            assert reply.status_code == 200, reply.text
            assert reply.headers.get("x-unenforced-formats") == told
            assert engine.requests[-1].grammar
            for name in (told or "").split(", "):
                assert f'"format": "{name}"' not in str(engine.requests[-1].grammar).replace("\\", "")


def test_formats_of_free_arguments_are_not_told(http: httpx.Client) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": formatted("password")}}]
    for fields in ({"tools": tools}, {"tools": tools, "tool_choice": "none"}):
        assert "x-unenforced-formats" not in http.post(CHAT, json={**ASK, **fields}).headers


def test_unknown_formats_are_refused_at_their_place(http: httpx.Client) -> None:
    schema = {"type": "object", "properties": {"a": {"items": {"type": "string", "format": "zip-code"}}}}
    for fields in schema_fields(schema)[:3]:
        reply = http.post(CHAT, json={**ASK, **fields})
        assert reply.status_code == 400
        assert "$.properties.a.items: the format 'zip-code' is not known" in reply.json()["error"]["message"]


def test_pages(http: httpx.Client) -> None:
    home = http.get("/").json()
    assert home["models"] == [MODEL]
    assert all(http.get(link).status_code == 200 for link in home["links"].values())
    docs = http.get("/docs")
    assert docs.headers["content-type"].startswith("text/html")
    assert "POST /v1/chat/completions" in docs.text
    assert "reasoning_effort" in docs.text
    assert not re.search(r"(src|href)=\"?(https?:)?//|@import|url\(", docs.text)
    assert http.get("/models").json() == http.get("/v1/models").json()
    assert http.get(f"/models/{MODEL}").json()["id"] == MODEL


def test_the_document_tells_fields_without_effect(http: httpx.Client) -> None:
    body = http.get("/openapi.json").json()["paths"][CHAT]["post"]["requestBody"]["content"]["application/json"]
    properties = body["schema"]["properties"]
    assert properties["verbosity"] == properties["user"] == {"description": "Accepted without effect."}
    assert properties["store"] == {"enum": [None, False]}
    assert properties["audio"] == {"type": "null"}
    assert "xhigh" in str(properties["reasoning_effort"])
    assert {"usage", "thinking", "enable_thinking"} <= properties.keys()


def test_aliases(text: TextCodec) -> None:
    engine = FakeEngine(text.tokenizer)
    with serve(engine, text, SETTINGS.model_copy(update={"model_aliases": ("gpt-4o", "a/b")})) as url:
        models = httpx.get(f"{url}/v1/models").json()["data"]
        assert [(model["id"], model["root"]) for model in models] == [
            (name, MODEL) for name in (MODEL, "gpt-4o", "a/b")
        ]
        for name in ("gpt-4o", "a/b", MODEL):
            assert httpx.post(url + CHAT, json={**ASK, "model": name}).json()["model"] == MODEL
            assert httpx.get(f"{url}/v1/models/{name}").json()["id"] == name
            assert httpx.post(f"{url}/tokenize", json={"prompt": "a", "model": name}).status_code == 200
        refused = httpx.post(url + CHAT, json={**ASK, "model": "other"})
        assert refused.status_code == 404
        assert "'test-model' and 'gpt-4o' and 'a/b'" in refused.json()["error"]["message"]


@pytest.fixture(scope="module")
def shared(text: TextCodec, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, FakeEngine]]:
    """A server with keys that one page may call."""
    keys: Path = tmp_path_factory.mktemp("keys") / "keys.txt"
    keys.write_text(f"{KEY}\n")
    keys.chmod(0o600)
    engine = FakeEngine(text.tokenizer)
    with serve(engine, text, SETTINGS.model_copy(update={"allowed_origins": (PAGE,)}), keys=KeyFile(keys)) as url:
        yield url, engine


def test_preflight_needs_no_key(shared: tuple[str, FakeEngine]) -> None:
    asked = {"origin": PAGE, "access-control-request-method": "POST"}
    asked["access-control-request-headers"] = "authorization,content-type,x-stainless-os"
    reply = httpx.options(shared[0] + CHAT, headers=asked)
    assert reply.status_code == 200
    assert reply.headers["access-control-allow-origin"] == PAGE
    assert "x-stainless-os" in reply.headers["access-control-allow-headers"]
    assert "POST" in reply.headers["access-control-allow-methods"]
    other = httpx.options(shared[0] + CHAT, headers={**asked, "origin": "https://other.example"})
    assert other.status_code == 400
    assert "access-control-allow-origin" not in other.headers


@pytest.mark.parametrize(
    ("method", "path", "fields", "status"),
    [
        ("POST", CHAT, {}, 200),
        ("POST", CHAT, {"stream": True}, 200),
        ("POST", CHAT, {"top_p": 7}, 400),
        ("POST", CHAT, {"model": "other"}, 404),
        ("POST", "/nowhere", {}, 404),
        ("DELETE", "/v1/models", {}, 405),
        ("GET", "/v1/models", {}, 200),
        ("POST", CHAT, {"seed": 429}, 429),
        ("POST", CHAT, {"seed": 500}, 500),
        ("POST", CHAT, {"seed": 500, "stream": True}, 500),
    ],
)
def test_pages_may_read_every_reply(
    shared: tuple[str, FakeEngine], method: str, path: str, fields: dict[str, Any], status: int
) -> None:
    url, engine = shared
    failures = {429: Overloaded("full", 3), 500: RuntimeError("broken")}
    said = engine.say("Hi.")
    engine.script = lambda request: [failures[seed]] if (seed := request.sampling.seed) in failures else said(request)
    body = json.dumps({**ASK, **fields})
    headers = {"origin": PAGE, "authorization": f"Bearer {KEY}", "content-type": "application/json"}
    reply = httpx.request(method, url + path, content=body, headers=headers)
    assert reply.status_code == status
    assert reply.headers["access-control-allow-origin"] == PAGE
    exposed = {name.strip().lower() for name in reply.headers["access-control-expose-headers"].split(",")}
    assert {"x-request-id", "retry-after"} <= exposed
    assert reply.headers["x-request-id"]
    assert (status == 429) == ("retry-after" in reply.headers)


def test_a_page_may_read_that_its_key_is_missing_or_its_id_bad(shared: tuple[str, FakeEngine]) -> None:
    for headers, status in (({}, 401), ({"x-request-id": "x" * 200}, 400)):
        reply = httpx.post(shared[0] + CHAT, json=ASK, headers={"origin": PAGE, **headers})
        assert (reply.status_code, reply.headers["access-control-allow-origin"]) == (status, PAGE)


def test_no_page_may_call_by_default(http: httpx.Client) -> None:
    preflight = http.options(CHAT, headers={"origin": PAGE, "access-control-request-method": "POST"})
    assert preflight.status_code == 405
    for reply in (preflight, http.post(CHAT, json=ASK, headers={"origin": PAGE})):
        assert not [name for name in reply.headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    "body",
    [
        gzip.compress(json.dumps(ASK).encode()),
        gzip.compress(json.dumps(ASK).encode()[:20]) + gzip.compress(json.dumps(ASK).encode()[20:]),
        gzip.compress(json.dumps({**ASK, "user": "x" * 190_000}).encode()),
    ],
    ids=["short", "two members", "long"],
)
def test_compressed_bodies(http: httpx.Client, body: bytes) -> None:
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    assert http.post(CHAT, content=body, headers=headers).status_code == 200
    pieces = (body[at : at + 7] for at in range(0, min(len(body), 700), 7))
    assert http.post(CHAT, content=pieces, headers=headers).status_code == (200 if len(body) <= 700 else 400)


def test_a_bomb_is_inflated_no_further_than_the_limit(http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    from divisi.deploy.api.body import inflating

    most = 0

    class Counting(inflating.Plain):
        def write(self, piece: bytes) -> None:
            nonlocal most
            most = max(most, len(piece))
            super().write(piece)

    monkeypatch.setattr(inflating, "Plain", Counting)
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    reply = http.post(CHAT, content=gzip.compress(b" " * 50_000_000), headers=headers)
    assert reply.status_code == 413
    assert 0 < most <= 200_001


def test_a_failure_of_the_engine_tells_nothing_of_its_parser(http: httpx.Client, engine: FakeEngine) -> None:
    engine.script = lambda request: [
        TokenEvent("r", (), None, finish_reason="error", error="the grammar library failed")
    ]
    reply = http.post(CHAT, json=ASK)
    assert reply.status_code == 500
    assert reply.json()["error"]["message"] == "the grammar library failed"
