"""Stop strings and stop ids count in content: after the thinking part, and beside tool calls."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from divisi.cluster.engine.sequence import Sequence
from divisi.cluster.request import Request
from divisi.model.text import ChatTemplate, TextCodec, Tokenizer
from tests.deploy.api.conftest import MODEL, SETTINGS
from tests.deploy.api.fake_engine import FakeEngine, Script, events_of, serve
from tests.deploy.api.test_answer import joined, parts_of, rule, run, spelled

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{{ '' if loop.last and m.role == 'assistant' else "
    "'<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
CALL = '<tool_call>\n{"name": "f", "arguments": {"x": "a\\n\\nb; c"}}\n</tool_call>'
CALLED = {0: 'f{"x": "a\\n\\nb; c"}'}


@pytest.mark.parametrize(
    ("said", "stops", "parts", "stop_reason"),
    [
        ("a\n\nb</think>\n\nc\n\nd", ["\n\n"], ("a\n\nb", "c", {}), "\n\n"),
        ("a; b</think>c; d", [";"], ("a; b", "c", {}), ";"),
        ("a;", [";"], ("a;", "", {}), None),
        ("ab</think>cd", ["bc", "b", "</think>", "<"], ("ab", "cd", {}), None),
        ("a</think>\n\n" + CALL, ["\n\n", "\n", "b;", '"x"', "}"], ("a", "", CALLED), None),
        ("a</think>" + CALL + "\n" + CALL, ["\n"], ("a", "", CALLED | {1: CALLED[0]}), None),
        ("a</think>b\n" + CALL + "\nd; e", ["; "], ("a", "bd", CALLED), "; "),
        ("a</think>b;" + CALL, [";"], ("a", "b", {}), ";"),
        ("a</think>be" + CALL + "nd", ["end"], ("a", "bend", CALLED), None),
        (
            "a</think>" + CALL.replace("}}", "}"),
            ["; c"],
            ("a", '<tool_call>\n{"name": "f", "arguments": {"x": "a\\n\\nb', {}),
            "; c",
        ),
    ],
    ids=[
        "line ends",
        "letters",
        "never closed",
        "across the tag",
        "call",
        "calls",
        "after a call",
        "before a call",
        "across a call",
        "no call",
    ],
)
@pytest.mark.parametrize("group", [1, 4, 1000])
def test_stop_strings_count_in_content(
    text: TextCodec, said: str, stops: list[str], parts: Any, stop_reason: str | None, group: int
) -> None:
    deltas, _ = run(text, text.tokenizer.encode(said), stops, group, parse=rule(text, opened=True))
    assert parts_of(deltas) == parts
    assert joined(deltas).stop_reason == stop_reason


def test_the_letters_of_a_tag_in_other_tokens_are_content(text: TextCodec) -> None:
    ids = [*text.tokenizer.encode("a</think>b"), *spelled(text, "</think>c")]
    deltas, _ = run(text, ids, ["</think>"], 2, parse=rule(text, opened=True))
    assert (parts_of(deltas), joined(deltas).stop_reason) == (("a", "b", {}), "</think>")


def test_a_stop_string_in_the_output_is_content(text: TextCodec) -> None:
    ids = text.tokenizer.encode("a. b</think>c. d")
    deltas, _ = run(text, ids, ["."], 3, parse=rule(text, opened=True), include_stop=True)
    assert parts_of(deltas) == ("a. b", "c.", {})


def obeying(tokenizer: Tokenizer, said: str, at_once: int) -> Script:
    """An answer that ends as the worker's does, several tokens in each step."""
    ids = tokenizer.encode(said)

    def script(request: Request) -> Iterator[Any]:
        sequence = Sequence(request, 0, list(request.prompt), 999)
        end = next((index for index, token in enumerate(ids) if sequence.stops_at(token)), None)
        events = events_of(request, ids[:end], group=at_once, end="stop")
        return iter([*events[:-1], _ended(events[-1], None if end is None else ids[end])])

    return script


def _ended(event: Any, stop_id: int | None) -> Any:
    return type(event)(event.request_id, event.token_ids, None, finish_reason="stop", stop_id=stop_id)


@pytest.fixture(scope="module")
def thinker(text: TextCodec) -> Iterator[tuple[httpx.Client, FakeEngine]]:
    engine = FakeEngine(text.tokenizer)
    codec = TextCodec(text.tokenizer, ChatTemplate(TEMPLATE), text.eos_ids, text.sampling)
    with serve(engine, codec, SETTINGS) as url, httpx.Client(base_url=url, timeout=20) as client:
        yield client, engine


def ask(client: httpx.Client, path: str = "/v1/chat/completions", **fields: Any) -> dict[str, Any]:
    if "prompt" not in fields:
        fields = {"messages": [{"role": "user", "content": "Hi"}], **fields}
    reply = client.post(path, json={"model": MODEL, "max_tokens": 200, **fields})
    assert reply.status_code == 200, reply.text
    choice: dict[str, Any] = reply.json()["choices"][0]
    return choice


TOOLS = [{"type": "function", "function": {"name": "f"}}]


@pytest.mark.parametrize("at_once", [1, 5])
def test_named_stop_ids_count_in_content(thinker: tuple[httpx.Client, FakeEngine], at_once: int) -> None:
    client, engine = thinker
    colon = engine.tokenizer.encode(":")[0]
    engine.script = obeying(engine.tokenizer, f"a: b</think>{CALL}c: d", at_once)
    choice = ask(client, stop_token_ids=[colon], tools=TOOLS)
    message = choice["message"]
    assert (message["reasoning"], message["content"], choice["stop_reason"]) == ("a: b", "c", colon)
    assert json.loads(message["tool_calls"][0]["function"]["arguments"]) == {"x": "a\n\nb; c"}
    engine.script = obeying(engine.tokenizer, "a: b</think>c<|im_end|>d", at_once)
    assert ask(client, stop_token_ids=[colon])["message"]["content"] == "c"


@pytest.mark.parametrize("at_once", [1, 5])
def test_the_end_of_text_ends_anywhere(thinker: tuple[httpx.Client, FakeEngine], at_once: int) -> None:
    client, engine = thinker
    engine.script = obeying(engine.tokenizer, "a<|im_end|>b</think>c", at_once)
    assert ask(client)["message"]["reasoning"] == "a"
    engine.script = obeying(engine.tokenizer, "a</think>" + CALL.replace("b;", "<|im_end|>"), at_once)
    choice = ask(client, tools=TOOLS)
    assert "tool_calls" not in choice["message"]
    assert choice["message"]["content"].startswith("<tool_call>")


def test_completions_are_raw(thinker: tuple[httpx.Client, FakeEngine]) -> None:
    client, engine = thinker
    colon = engine.tokenizer.encode(":")[0]
    engine.script = obeying(engine.tokenizer, "<think>a: b</think>c; d", 2)
    assert ask(client, "/v1/completions", prompt="<think>", stop=["b</"])["text"] == "<think>a: "
    choice = ask(client, "/v1/completions", prompt="<think>", stop_token_ids=[colon])
    assert (choice["text"], choice["stop_reason"]) == ("<think>a", colon)


def test_a_message_that_is_continued_may_stand_inside_the_thinking(thinker: tuple[httpx.Client, FakeEngine]) -> None:
    client, engine = thinker
    engine.script = obeying(engine.tokenizer, " go\n\non</think>\n\nSo: yes\n\nno", 1)
    for said, parts in (("<think>\nLet me", (" go\n\non", "So: yes")), ("<think>a</think>b", (None, " go"))):
        messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": said}]
        message = ask(client, messages=messages, continue_final_message=True, stop="\n\n")["message"]
        assert (message.get("reasoning"), message["content"]) == parts
