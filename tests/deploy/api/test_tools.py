"""Tool calls and reasoning through the real `openai` client, the engine's tokens being scripted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from llguidance import LLMatcher

from divisi.model.random_checkpoint.tokenizer import write_random_tokenizer
from divisi.model.text import ChatTemplate, TextCodec
from divisi.model.text.grammar.tokens import GrammarVocabulary
from tests.deploy.api.conftest import MODEL, SETTINGS
from tests.deploy.api.fake_engine import FakeEngine, serve

ASK: Any = [{"role": "user", "content": "Weather?"}]
SCHEMA: dict[str, Any] = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
SCHEMA["additionalProperties"] = False
ODD = {"city": 'Zürich "\\\n 你好 👩‍🚀', "deep": {"a": [1, {"b": [None, True, -1.5e3]}]}}


THINKING = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{{ '<think>\\n\\n</think>\\n\\n' if enable_thinking is false else '<think>\\n' }}"
)
ROOMY = SETTINGS.model_copy(update={"max_model_len": 4096})


@contextmanager
def served(text: TextCodec) -> Iterator[tuple[openai.OpenAI, FakeEngine]]:
    engine = FakeEngine(text.tokenizer)
    with (
        serve(engine, text, ROOMY) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=20) as client,
    ):
        yield client, engine
    assert engine.all_closed(10)


@pytest.fixture(scope="module")
def plain(text: TextCodec) -> Iterator[tuple[openai.OpenAI, FakeEngine]]:
    with served(text) as pair:
        yield pair


@pytest.fixture
def client(plain: tuple[openai.OpenAI, FakeEngine]) -> openai.OpenAI:
    return plain[0]


@pytest.fixture
def engine(plain: tuple[openai.OpenAI, FakeEngine]) -> FakeEngine:
    plain[1].reset()
    return plain[1]


@pytest.fixture
def thinker(text: TextCodec) -> Iterator[tuple[openai.OpenAI, FakeEngine]]:
    with served(TextCodec(text.tokenizer, ChatTemplate(THINKING), text.eos_ids, text.sampling)) as pair:
        yield pair


def tool(name: str, *, strict: bool = False) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": SCHEMA, "strict": strict}}


TOOLS: Any = [tool("weather"), tool("time")]


def block(name: str, arguments: dict[str, Any], *, ascii_only: bool = False) -> str:
    text = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=ascii_only)
    return f"<tool_call>\n{text}\n</tool_call>"


def whole_and_streamed(client: openai.OpenAI, **fields: Any) -> list[Any]:
    """The choice as one body, and as the client's own helper puts it together from the stream."""
    whole = client.chat.completions.create(model=MODEL, messages=ASK, **fields).choices[0]
    with client.chat.completions.stream(model=MODEL, messages=ASK, **fields) as stream:
        for _ in stream:
            pass
        return [whole, stream.get_final_completion().choices[0]]


def calls_of(choice: Any) -> list[tuple[str, dict[str, Any]]]:
    calls = choice.message.tool_calls or []
    assert all(call.id.startswith("call_") and call.type == "function" for call in calls)
    assert len({call.id for call in calls}) == len(calls)
    return [(call.function.name, json.loads(call.function.arguments)) for call in calls]


@pytest.mark.parametrize("group", [1, 3, 1000])
@pytest.mark.parametrize("before", ["", "Let me look."])
@pytest.mark.parametrize("ascii_only", [False, True])
def test_calls(client: openai.OpenAI, engine: FakeEngine, group: int, before: str, ascii_only: bool) -> None:
    said = "\n".join([before, block("weather", ODD, ascii_only=ascii_only), block("time", {})]).lstrip("\n")
    engine.script = engine.say(said, group=group)
    for choice in whole_and_streamed(client, tools=TOOLS):
        assert calls_of(choice) == [("weather", ODD), ("time", {})]
        assert (choice.message.content or "") == before
        assert choice.finish_reason == "tool_calls"


def test_one_call_at_most(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.script = engine.say(block("weather", {"city": "Paris"}) + "\n" + block("time", {}))
    for choice in whole_and_streamed(client, tools=TOOLS, parallel_tool_calls=False):
        assert calls_of(choice) == [("weather", {"city": "Paris"})]
        assert choice.finish_reason == "tool_calls"


@pytest.mark.parametrize("end", ["stop", "length"])
def test_a_broken_block_is_content(client: openai.OpenAI, engine: FakeEngine, end: Any) -> None:
    broken = block("weather", {"city": "Paris"})[:-20]
    engine.script = engine.say(broken, end=end)
    whole = client.chat.completions.create(model=MODEL, messages=ASK, tools=TOOLS).choices[0]
    assert whole.message.tool_calls is None
    assert whole.message.content == broken
    assert whole.finish_reason == end


def test_no_tools_no_calls(client: openai.OpenAI, engine: FakeEngine) -> None:
    said = block("weather", {})
    engine.script = engine.say(said)
    for fields in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        answer = client.chat.completions.create(model=MODEL, messages=ASK, **fields)
        assert answer.choices[0].message.content == said
        assert "weather" not in engine.tokenizer.decode(engine.requests[-1].prompt)


def test_results_in_the_next_turn(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.script = engine.say(block("weather", {"city": "Zürich"}))
    answer = client.chat.completions.create(model=MODEL, messages=ASK, tools=TOOLS).choices[0].message
    assert answer.tool_calls
    result = {"role": "tool", "tool_call_id": answer.tool_calls[0].id, "content": "Snow"}
    turns: Any = [*ASK, answer, result]
    client.chat.completions.create(model=MODEL, messages=turns, tools=TOOLS)
    prompt = engine.tokenizer.decode(engine.requests[-1].prompt, skip_special=False)
    assert "<|im_start|>assistant\n" + block("weather", {"city": "Zürich"}) + "<|im_end|>" in prompt
    assert "<tool_response>\nSnow\n</tool_response>" in prompt
    assert '{"type": "function", "function": {"name": "time"' in prompt


@pytest.fixture(scope="session")
def matcher_for(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp("grammar-tokenizer")
    write_random_tokenizer(folder, 600, 512)
    tokenizer, reader = TextCodec.load(folder).tokenizer, GrammarVocabulary.load(folder).tokenizer

    def accepts(grammar: str, text: str) -> bool:
        matcher, ids = LLMatcher(reader, grammar), tokenizer.encode(text)
        assert not matcher.is_error(), matcher.get_error()
        return bool(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())

    return accepts


GOOD, WRONG = block("weather", {"city": "Paris"}), block("weather", {"town": "Paris"})
NAMED = {"type": "function", "function": {"name": "time"}}
LOOSE = [{"type": "function", "function": {"name": "loose", "parameters": {"properties": {"a": {"type": "string"}}}}}]
UNLOOSE = '<tool_call>\n{"name": "loose", "arguments": 5}\n</tool_call>'


@pytest.mark.parametrize(
    ("fields", "taken", "refused"),
    [
        ({"tools": [tool("weather", strict=True)]}, ["Hi.", "Hi.\n" + GOOD, GOOD + "\n" + GOOD], [WRONG]),
        ({"tools": TOOLS, "tool_choice": "required"}, [GOOD, GOOD + "\n" + GOOD], ["Hi.", WRONG]),
        ({"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}, [GOOD], [GOOD + "\n" + GOOD]),
        ({"tools": LOOSE, "tool_choice": "required"}, [block("loose", {"a": "x"})], [UNLOOSE]),
        ({"tools": TOOLS, "tool_choice": NAMED}, [block("time", {"city": "x"})], [GOOD, "Hi."]),
        (
            {"tools": TOOLS, "response_format": {"type": "json_object"}},
            ["{}", GOOD, WRONG],
            ["Hi.", block("nowhere", {})],
        ),
    ],
)
def test_grammars(
    client: openai.OpenAI, engine: FakeEngine, matcher_for: Any, fields: Any, taken: list[str], refused: list[str]
) -> None:
    client.chat.completions.create(model=MODEL, messages=ASK, **fields)
    grammar = engine.requests[-1].grammar
    assert [matcher_for(grammar, text) for text in taken] == [True] * len(taken)
    assert [matcher_for(grammar, text) for text in refused] == [False] * len(refused)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tools": [{**tool("a b")}]}, "name"),
        ({"tools": [tool("a"), tool("a")]}, "a second function 'a'"),
        ({"tools": [tool(f"f{i}") for i in range(129)]}, "at most 128"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "no tool 'x'"),
        ({"tool_choice": "required"}, "no tools"),
        ({"tools": TOOLS, "tool_choice": "any"}, "auto"),
        ({"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "array"}}}]}, "'object'"),
        ({"reasoning_effort": "high"}, "no thinking"),
    ],
)
def test_what_is_refused(client: openai.OpenAI, fields: Any, words: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=ASK, **fields)
    assert words in str(caught.value)


def test_a_strict_schema_that_cannot_be_enforced(client: openai.OpenAI) -> None:
    bad: Any = tool("a", strict=True)
    bad["function"]["parameters"] = {"type": "object", "not": {}}
    with pytest.raises(openai.BadRequestError, match="'not' is not supported"):
        client.chat.completions.create(model=MODEL, messages=ASK, tools=[bad])


def test_reasoning(thinker: tuple[openai.OpenAI, FakeEngine]) -> None:
    client, engine = thinker
    thought = "Hm. 你好\n</think>"
    engine.script = engine.say(f"{thought}\n\nSnow.\n" + block("weather", ODD))
    for choice in whole_and_streamed(client, tools=TOOLS):
        assert choice.message.reasoning == "Hm. 你好"
        assert choice.message.content == "Snow."
        assert calls_of(choice) == [("weather", ODD)]
    answer = client.chat.completions.create(model=MODEL, messages=ASK, extra_body={"include_reasoning": False})
    assert not hasattr(answer.choices[0].message, "reasoning")
    assert answer.usage is not None
    assert answer.usage.completion_tokens_details is not None
    assert answer.usage.completion_tokens_details.reasoning_tokens == len(engine.tokenizer.encode(thought))


def test_thinking_that_never_ends(thinker: tuple[openai.OpenAI, FakeEngine]) -> None:
    client, engine = thinker
    engine.script = engine.say("Hm. " + block("weather", {}), end="length")
    choice: Any = client.chat.completions.create(model=MODEL, messages=ASK, tools=TOOLS).choices[0]
    assert choice.message.reasoning == "Hm. " + block("weather", {})
    assert not choice.message.content
    assert choice.finish_reason == "length"


def test_effort_and_budget(thinker: tuple[openai.OpenAI, FakeEngine], matcher_for: Any) -> None:
    client, engine = thinker
    ids = engine.tokenizer.encode("one two three")
    for budget, taken in ((len(ids), True), (len(ids) - 1, False), (0, False)):
        client.chat.completions.create(model=MODEL, messages=ASK, extra_body={"thinking_token_budget": budget})
        grammar = engine.requests[-1].grammar
        assert matcher_for(grammar, "one two three</think>\n\nYes.") == taken
        assert matcher_for(grammar, "</think>\n\nYes.") or budget > 0
    client.chat.completions.create(model=MODEL, messages=ASK, reasoning_effort="none")
    assert engine.tokenizer.decode(engine.requests[-1].prompt).endswith("</think>\n\n")
    assert engine.requests[-1].grammar is None
    client.chat.completions.create(model=MODEL, messages=ASK, response_format={"type": "json_object"})
    grammar = engine.requests[-1].grammar
    assert matcher_for(grammar, "Hm.\n</think>\n\n{}")
    assert not matcher_for(grammar, "Hm.\n</think>\n\nYes.")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
@pytest.mark.parametrize("left", [9, 24])
def test_a_forced_call_that_is_cut_stays_one(client: openai.OpenAI, engine: FakeEngine, left: int, choice: Any) -> None:
    """Whole and streamed alike: the arguments as far as they came, no content, and the length as the reason."""
    said = block("weather", ODD)
    engine.script = engine.say(said)
    few = len(engine.tokenizer.encode(said)) - left
    fields: dict[str, Any] = {"model": MODEL, "messages": ASK, "tools": TOOLS, "tool_choice": choice, "max_tokens": few}
    whole = client.chat.completions.create(**fields).choices[0]
    assert whole.finish_reason == "length"
    assert not whole.message.content
    assert whole.message.tool_calls
    (call,) = whole.message.tool_calls
    text = json.dumps(ODD, ensure_ascii=False)
    assert call.function.name == "weather"
    assert call.function.arguments
    assert text.startswith(call.function.arguments)
    assert text != call.function.arguments
    deltas = [chunk.choices[0] for chunk in client.chat.completions.create(**fields, stream=True)]
    streamed = [piece for choice_ in deltas for piece in choice_.delta.tool_calls or []]
    assert "".join(piece.function.arguments for piece in streamed) == call.function.arguments
    assert [piece.function.name for piece in streamed if piece.function.name] == ["weather"]
    assert not "".join(choice_.delta.content or "" for choice_ in deltas)
    assert deltas[-1].finish_reason == "length"


def test_a_forced_call_that_is_cut_before_its_arguments(client: openai.OpenAI, engine: FakeEngine) -> None:
    named, unnamed = '<tool_call>\n{"name": "weather", "argum', '<tool_call>\n{"name": "wea'
    for said, calls in ((named, [("weather", "")]), (unnamed, [])):
        engine.script = engine.say(said, end="length")
        fields: Any = {"model": MODEL, "messages": ASK, "tools": TOOLS, "tool_choice": "required"}
        whole = client.chat.completions.create(**fields).choices[0]
        found = [(call.function.name, call.function.arguments) for call in whole.message.tool_calls or []]
        assert found == calls
        assert not whole.message.content
        deltas = [chunk.choices[0].delta for chunk in client.chat.completions.create(**fields, stream=True)]
        pieces = [piece.function for delta in deltas for piece in delta.tool_calls or []]
        assert [(piece.name, piece.arguments) for piece in pieces] == calls
        assert not "".join(delta.content or "" for delta in deltas)


def test_the_second_of_two_forced_calls_is_cut(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.script = engine.say(block("weather", {"city": "Oslo"}) + "\n" + block("time", ODD)[:60], end="length")
    whole = client.chat.completions.create(model=MODEL, messages=ASK, tools=TOOLS, tool_choice="required").choices[0]
    assert [call.function.name for call in whole.message.tool_calls or []] == ["weather", "time"]
    assert (whole.finish_reason, whole.message.content) == ("length", None)


def test_a_forced_call_that_the_model_ends_is_no_cut_one(client: openai.OpenAI, engine: FakeEngine) -> None:
    broken = block("weather", {"city": "Paris"})[:-20]
    engine.script = engine.say(broken, end="stop")
    whole = client.chat.completions.create(model=MODEL, messages=ASK, tools=TOOLS, tool_choice="required").choices[0]
    assert (whole.message.tool_calls, whole.message.content) == (None, broken)
