"""Conversations as SDKs, agents and proxies send them back: what is dropped, what is converted, what stays refused."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pydantic
import pytest

from divisi.deploy.api.body.replayed import KNOWN_DROPPED
from divisi.model.text import ChatTemplate, TextCodec
from tests.deploy.api.conftest import MODEL, SETTINGS
from tests.deploy.api.fake_engine import FakeEngine, serve

CHAT = "/v1/chat/completions"
ASK = {"role": "user", "content": "Weather?"}
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
RESULT = {"role": "tool", "tool_call_id": "call_1", "content": "Snow"}
NO_ARGUMENTS = {**CALL, "function": {"name": "weather", "arguments": ""}}


def assistant(**fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": "Hi.", **fields}


def calling(*, call: dict[str, Any] | None = None, function: dict[str, Any] | None = None) -> dict[str, Any]:
    return {**CALL, **(call or {}), "function": {**CALL["function"], **(function or {})}}  # type: ignore[dict-item]


def prompt_of(http: httpx.Client, engine: FakeEngine, *messages: Any, **fields: Any) -> str:
    """What the model reads of a conversation."""
    body = {"model": MODEL, "messages": [ASK, *messages], **fields}
    reply = http.post(CHAT, content=json.dumps(body), headers={"content-type": "application/json"})
    assert reply.status_code == 200, reply.text
    return engine.tokenizer.decode(engine.requests[-1].prompt, skip_special=False)


MESSAGE_KEYS = {
    "parsed": None, "refusal": None, "annotations": [], "audio": None, "function_call": None, "tool_calls": None,
    "id": "msg_1", "timestamp": 1.5, "created_at": "2026", "index": 0, "provider_specific_fields": {"a": 1},
    "cache_control": {"type": "ephemeral"}, "reasoning_details": [{}], "usage": {}, "model": "m",
    "metadata": {"k": "v"}, "what_nobody_knows": [{"deep": 1}],
}  # fmt: skip


@pytest.mark.parametrize("plain", [ASK, assistant(), RESULT], ids=["user", "assistant", "tool"])
def test_keys_of_messages(http: httpx.Client, engine: FakeEngine, plain: dict[str, Any]) -> None:
    expected = prompt_of(http, engine, plain)
    for key, value in MESSAGE_KEYS.items():
        assert prompt_of(http, engine, {**plain, key: value}) == expected, key


@pytest.mark.parametrize(
    ("replayed", "plain"),
    [
        ([assistant(content=None, tool_calls=[calling(call={"index": 0})])], [calling()]),
        ([assistant(content=None, tool_calls=[calling(call={"cache_control": {}, "extra_content": {}})])], [calling()]),
        ([assistant(content=None, tool_calls=[calling(call={"type": None})])], [calling()]),
        ([assistant(content=None, tool_calls=[calling(function={"parsed_arguments": {"city": "Oslo"}})])], [calling()]),
        ([assistant(content=None, tool_calls=[calling(function={"arguments": {"city": "Oslo"}})])], [calling()]),
        ([assistant(content=None, tool_calls=[calling(function={"arguments": None})])], [NO_ARGUMENTS]),
        ([assistant(content=None, function_call=CALL["function"])], [calling()]),
        ([assistant(content=None, function_call=CALL["function"], tool_calls=[CALL])], [calling()]),
        ([{"role": "assistant", "tool_calls": [CALL]}], [calling()]),
        ([assistant(content=[], tool_calls=[CALL])], [calling()]),
    ],
)
def test_calls(http: httpx.Client, engine: FakeEngine, replayed: list[Any], plain: list[Any]) -> None:
    expected = {"role": "assistant", "content": "", "tool_calls": plain}
    assert prompt_of(http, engine, *replayed) == prompt_of(http, engine, expected)


@pytest.mark.parametrize(
    ("replayed", "plain"),
    [
        ({**RESULT, "content": None}, {**RESULT, "content": ""}),
        ({**RESULT, "content": []}, {**RESULT, "content": ""}),
        ({"role": "tool", "tool_call_id": "call_1"}, {**RESULT, "content": ""}),
        ({**RESULT, "tool_call_id": ""}, RESULT),
        ({"role": "function", "name": "weather", "content": "Snow"}, RESULT),
        ({"role": "function", "name": "weather", "content": None}, {**RESULT, "content": ""}),
        (
            {**RESULT, "content": [{"type": "text", "text": "Snow", "cache_control": {}, "annotations": []}]},
            {**RESULT, "content": "Snow"},
        ),
        (assistant(content=None), assistant(content="")),
        ({"role": "assistant"}, assistant(content="")),
        (assistant(content=None, refusal="No."), assistant(content="No.")),
        (assistant(content=[{"type": "refusal", "refusal": "No."}]), assistant(content="No.")),
        (assistant(content=[{"type": "text", "text": "Hi.", "logprobs": []}]), assistant()),
    ],
)
def test_contents(http: httpx.Client, engine: FakeEngine, replayed: Any, plain: Any) -> None:
    assert prompt_of(http, engine, replayed) == prompt_of(http, engine, plain)


def test_keys_of_tools(http: httpx.Client, engine: FakeEngine) -> None:
    told = {**TOOL, "defer_loading": True, "cache_control": {}, "function": {**TOOL["function"], "input_examples": []}}  # type: ignore[dict-item]
    assert prompt_of(http, engine, tools=[told]) == prompt_of(http, engine, tools=[TOOL])


@pytest.fixture(scope="module")
def shown(text: TextCodec) -> Any:
    """A server whose template shows reasoning."""
    source = "{% for m in messages %}[{{ m.reasoning_content or '' }}]{{ m.content }}{% endfor %}"
    engine = FakeEngine(text.tokenizer)
    codec = TextCodec(text.tokenizer, ChatTemplate(source), text.eos_ids, text.sampling)
    with serve(engine, codec, SETTINGS) as url, httpx.Client(base_url=url, timeout=20) as http:
        yield http, engine


@pytest.mark.parametrize(
    "fields",
    [
        {"reasoning": "Hm."},
        {"reasoning_content": "Hm."},
        {"reasoning": None, "reasoning_content": "Hm."},
        {"reasoning": "", "reasoning_content": "Hm."},
        {"thinking_blocks": [{"type": "thinking", "thinking": "Hm.", "signature": "x"}]},
        {"thinking_blocks": [{"type": "redacted_thinking", "data": "x"}, {"type": "thinking", "thinking": "Hm."}]},
        {"content": [{"type": "thinking", "thinking": "Hm.", "signature": "x"}, {"type": "text", "text": "Hi."}]},
    ],
)
def test_reasoning(shown: tuple[httpx.Client, FakeEngine], fields: dict[str, Any]) -> None:
    assert prompt_of(*shown, assistant(**fields)).strip().removeprefix("[]Weather?").strip("[\n").lstrip() == "Hm.]Hi."


@pytest.fixture(scope="module")
def roomy(text: TextCodec) -> Iterator[tuple[str, FakeEngine]]:
    engine = FakeEngine(text.tokenizer)
    with serve(engine, text, SETTINGS.model_copy(update={"max_model_len": 2**16})) as url:
        yield url, engine


@pytest.mark.parametrize("broken", ['{"city": "Os', "null", "5", '["Oslo"]', "{'city': 1}", "[" * 10_000, "\\"])
def test_arguments_that_are_no_object_are_rendered_as_they_are(roomy: tuple[str, FakeEngine], broken: str) -> None:
    url, engine = roomy
    turn = assistant(content=None, tool_calls=[calling(function={"arguments": broken})])
    with httpx.Client(base_url=url, timeout=20) as http:
        assert f'{{"name": "weather", "arguments": {broken}}}' in prompt_of(http, engine, turn, RESULT)


@pytest.mark.parametrize(
    ("sent", "read"),
    [
        (r"a\ud83d", "a\ufffd"),  # an emoji that was cut
        (r"\ude00b", "\ufffdb"),
        (r"\ude00\ud83d", "\ufffd\ufffd"),
        (r"\ud83d\ud83d\ude00", "\ufffd\U0001f600"),
        (r"\uD83D\uDE00", "\U0001f600"),
        (r"\\ud83d", r"\ud83d"),  # a backslash and letters
        (r"\\\ud83d", "\\\ufffd"),
    ],
)
def test_lone_surrogates(http: httpx.Client, engine: FakeEngine, sent: str, read: str) -> None:
    for body in (
        f'{{"model": "{MODEL}", "messages": [{{"role": "user", "content": "x{sent}"}}]}}',
        f'{{"model": "{MODEL}", "messages": [{{"role": "tool", "content": "x{sent}", "tool_call_id": "{sent}"}}]}}',
    ):
        reply = http.post(CHAT, content=body, headers={"content-type": "application/json"})
        assert reply.status_code == 200, reply.text
        assert f"x{read}" in engine.tokenizer.decode(engine.requests[-1].prompt)


def test_a_name_that_no_tool_has_is_rendered_too(http: httpx.Client, engine: FakeEngine) -> None:
    turn = assistant(content=None, tool_calls=[calling(function={"name": "get weather!"})])
    assert '{"name": "get weather!", "arguments"' in prompt_of(http, engine, turn)


def test_lone_surrogates_within_arguments(http: httpx.Client, engine: FakeEngine) -> None:
    turn = assistant(content=None, tool_calls=[calling(function={"arguments": r'{"city": "Os\ud83d"}'})])
    assert '{"city": "Os\ufffd"}' in prompt_of(http, engine, turn)


REFUSED = [
    ({"messages": [{"role": "user", "content": [{"type": "video", "video": "x"}]}]}, "messages[0].content[0].type"),
    ({"messages": [assistant(content=[{"type": "video", "video": "x"}])]}, "messages[0].content[0].type"),
    ({"messages": [assistant(tool_calls=[calling(call={"type": "custom"})])]}, "messages[0].tool_calls[0].type"),
    ({"messages": [assistant(reasoning=5)]}, "messages[0].reasoning"),
    ({"tools": [{**TOOL, "type": "web_search"}]}, "tools[0].type"),
    ({"stream_options": {"parsed": None}, "stream": True}, "stream_options.parsed"),
    ({"structured_outputs": {"regex": "a", "index": 1}}, "structured_outputs.index"),
    ({"response_format": {"type": "json_object", "id": "a"}}, "response_format.id"),
    ({"usage": {"exclude": True}}, "usage.exclude"),
    ({"thinking": {"type": "sometimes"}}, "thinking.type"),
    ({"thinking": {"type": "enabled", "budget": 5}}, "thinking.budget"),
    ({"parsed": None}, "parsed"),
    ({"enable_thinking": True}, "enable_thinking"),
]


@pytest.mark.parametrize(("fields", "param"), REFUSED)
def test_what_stays_refused(http: httpx.Client, fields: dict[str, Any], param: str) -> None:
    reply = http.post(CHAT, json={"model": MODEL, "messages": [ASK], **fields})
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"] == param


@pytest.mark.parametrize(
    "fields",
    [
        {"verbosity": "low"},
        {"prompt_cache_retention": "24h"},
        {"usage": {"include": True}},
        {"enable_thinking": False},
        {"thinking": {"type": "disabled"}},
        {"thinking": {"type": "adaptive"}},
        {"logprobs": False, "top_logprobs": 0},
    ],
)
def test_fields_that_are_often_sent(http: httpx.Client, engine: FakeEngine, fields: dict[str, Any]) -> None:
    assert prompt_of(http, engine, **fields) == prompt_of(http, engine)


def test_usage_in_a_stream(http: httpx.Client, engine: FakeEngine) -> None:
    body = {"model": MODEL, "messages": [ASK], "stream": True}
    assert '"usage":{' not in http.post(CHAT, json=body).text
    assert http.post(CHAT, json={**body, "usage": {"include": True}}).text.count('"usage":{') == 1


@pytest.fixture(scope="module")
def thinker(text: TextCodec) -> Any:
    """A server whose template thinks."""
    source = "{{ messages[0].content }}{{ '<think>\n\n</think>\n\n' if enable_thinking is false else '<think>\n' }}"
    engine = FakeEngine(text.tokenizer)
    codec = TextCodec(text.tokenizer, ChatTemplate(source), text.eos_ids, text.sampling)
    with serve(engine, codec, SETTINGS) as url, httpx.Client(base_url=url, timeout=20) as http:
        yield http, engine


OFF, ON = {"enable_thinking": False}, {"enable_thinking": True}


@pytest.mark.parametrize(
    ("fields", "thinks", "budget"),
    [
        (OFF, False, None),
        (ON, True, None),
        ({"thinking": {"type": "disabled"}}, False, None),
        ({"thinking": {"type": "enabled", "budget_tokens": 77}}, True, 77),
        ({"thinking": {"type": "adaptive"}}, True, None),
        ({"reasoning_effort": "xhigh"}, True, None),
        ({"reasoning_effort": "low"}, True, 2048),
        ({"reasoning_effort": "low", "thinking": {"type": "enabled", "budget_tokens": 77}}, True, 77),
        ({"thinking_token_budget": 5, "thinking": {"type": "enabled", "budget_tokens": 77}}, True, 5),
        ({**ON, "thinking": {"type": "disabled"}}, True, None),
        ({**ON, "chat_template_kwargs": OFF}, False, None),
        ({**OFF, "reasoning_effort": "high"}, False, None),
    ],
)
def test_ways_to_ask_for_thinking(
    thinker: tuple[httpx.Client, FakeEngine], fields: dict[str, Any], thinks: bool, budget: int | None
) -> None:
    assert prompt_of(*thinker, **fields).endswith("<think>\n") == thinks
    grammar = thinker[1].requests[-1].grammar
    assert re.findall(r"max_tokens=(\d+)", grammar or "") == ([] if budget is None else [str(budget)])


def test_what_is_dropped_is_counted_under_fixed_labels(
    http: httpx.Client, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    def counts() -> dict[tuple[str, str], float]:
        rows = re.findall(r"^divisi_dropped_keys_total\{(.*)\} (\S+)$", http.get("/metrics").text, re.MULTILINE)
        labels = [dict(re.findall(r'(\w+)="([^"]*)"', row)) for row, _ in rows]
        return {(label["place"], label["key"]): float(row[1]) for label, row in zip(labels, rows, strict=True)}

    def told() -> list[list[str]]:
        found = [getattr(record, "fields", {}).get("dropped_keys", []) for record in caplog.records]
        return [names for names in found if any("strange" in name for name in names)]

    before = counts()
    strange = {f"strange_{index}_{'x' * 100}": 1 for index in range(50)}
    turn = assistant(parsed=None, **strange, tool_calls=[calling(call={"index": 0}, function={"parsed_arguments": {}})])
    with caplog.at_level(logging.INFO, "divisi.deploy.api.middleware.request_log"):
        prompt_of(http, engine, {**ASK, "id": "a"}, turn, tools=[{**TOOL, "defer_loading": True}])
        after = counts()
        until = time.monotonic() + 5
        while not told() and time.monotonic() < until:  # a line is written after its reply
            time.sleep(0.01)
    added = {key: after[key] - before.get(key, 0) for key in after if after[key] != before.get(key, 0)}
    assert added == {
        ("message", "id"): 1, ("message", "parsed"): 1, ("message", "other"): 50, ("call", "index"): 1,
        ("call", "parsed_arguments"): 1, ("tool", "defer_loading"): 1,
    }  # fmt: skip
    assert {key for place, key in after} <= {"other"}.union(*KNOWN_DROPPED.values())
    (names,) = told()
    assert len(names) == 8
    assert max(map(len, names)) < 80


class Answer(pydantic.BaseModel):
    city: str


SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
STRICT = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA, "strict": True}}
BLOCK = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


@pytest.mark.parametrize("streamed", [False, True])
def test_five_turns_of_the_openai_client(roomy: tuple[str, FakeEngine], streamed: bool) -> None:
    """Answers of `parse` and `stream` go back as the objects that they are."""
    url, engine = roomy
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=20)
    messages: list[Any] = [ASK]
    for _ in range(5):
        engine.script = engine.say(BLOCK)
        fields: Any = {"model": MODEL, "messages": messages, "tools": [STRICT]}
        if streamed:
            with client.chat.completions.stream(**fields) as stream:
                message: Any = stream.get_final_completion().choices[0].message
        else:
            message = client.chat.completions.parse(**fields).choices[0].message
        messages += [message, {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "Snow"}]
        engine.script = engine.say('{"city": "Oslo"}')
        answer = client.chat.completions.parse(model=MODEL, messages=messages, response_format=Answer)
        assert answer.choices[0].message.parsed == Answer(city="Oslo")
        messages += [answer.choices[0].message, ASK]
    prompt = engine.tokenizer.decode(engine.requests[-1].prompt, skip_special=False)
    assert prompt.count(BLOCK) == 5


def test_accumulated_deltas_go_back(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.script = engine.say(BLOCK)
    fields: Any = {"model": MODEL, "messages": [ASK], "tools": [STRICT], "tool_choice": "required"}
    few = len(engine.tokenizer.encode(BLOCK)) - 6
    message: dict[str, Any] = {"role": "assistant"}
    for chunk in client.chat.completions.create(**fields, stream=True, max_tokens=few):
        for call in chunk.choices[0].delta.tool_calls or []:
            calls = message.setdefault("tool_calls", [])
            if call.index == len(calls):
                calls.append(call.model_dump())
            else:
                calls[call.index]["function"]["arguments"] += call.function.arguments
    arguments = message["tool_calls"][0]["function"]["arguments"]
    assert arguments
    assert not arguments.endswith("}")
    fields["messages"] = [ASK, message, {**RESULT, "content": None}]
    client.chat.completions.create(**fields)
    prompt = engine.tokenizer.decode(engine.requests[-1].prompt, skip_special=False)
    assert f'"arguments": {arguments}}}\n</tool_call>' in prompt
