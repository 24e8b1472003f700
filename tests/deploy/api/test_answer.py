"""Streamed and whole answers are the same, and neither depends on how tokens come grouped."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
from hypothesis import given
from hypothesis import strategies as st

from divisi.cluster.request import Request, Sampling, TokenEvent, TokenLogprob
from divisi.deploy.api.body.protocol import ChatBody, CompletionBody
from divisi.deploy.api.compile.call import Call
from divisi.deploy.api.compile.parsing import ParseRule, ReasoningPart
from divisi.deploy.api.reply.answer import Answer, Delta
from divisi.deploy.api.reply.chat import ChatWriter
from divisi.deploy.api.reply.completions import CompletionWriter
from divisi.model.random_checkpoint.tokenizer import write_random_tokenizer
from divisi.model.text import TextCodec, Tokenizer
from divisi.model.text.tags import CALL, CALL_END, TAGS, THINK, THINK_END, tag_ids
from divisi.model.text.tool_calls import CallPart, RevokedPart, TextPart
from tests.deploy.api.fake_engine import FakeEngine, events_of

IDS = st.lists(st.integers(0, 599), max_size=40)
STOPS = st.lists(st.sampled_from(["a", "the", "\ufffd", "\n", " \ufffd", "e ", "ab", "<think>"]), max_size=3)


def run(text: TextCodec, ids: list[int], stops: list[str], group: int, **options: Any) -> tuple[list[Delta], Call]:

    logprobs = options.pop("logprobs", None)
    echo = options.pop("echo", False)
    parse = options.pop("parse", None)
    request = Request("r", tuple(ids[:7]) or (5,), 1000, Sampling(), frozenset(), logprobs, logprobs if echo else None)
    call = Call(request, tuple(stops), echo=echo, parse=parse, **options)
    answer = Answer(call, text.tokenizer)
    deltas: list[Delta] = []
    for event in events_of(request, ids, group=group):
        deltas.append(answer.push(event))
        if deltas[-1].finish_reason is not None:
            break
    return deltas, call


def joined(deltas: list[Delta]) -> Delta:
    whole = Delta("", [])
    for delta in deltas:
        whole.text += delta.text
        whole.token_ids += delta.token_ids
        whole.tokens += delta.tokens
        whole.finish_reason, whole.stop_reason = delta.finish_reason, delta.stop_reason
    return whole


@given(ids=IDS, stops=STOPS, group=st.integers(1, 9), echo=st.booleans())
def test_grouping_changes_nothing(text: TextCodec, ids: list[int], stops: list[str], group: int, echo: bool) -> None:
    one, _ = run(text, ids, stops, 1, logprobs=1, echo=echo)
    many, _ = run(text, ids, stops, group, logprobs=1, echo=echo)
    assert joined(one) == joined(many)


@given(ids=IDS, stops=STOPS, group=st.integers(1, 9))
def test_text_is_the_whole_decoding_cut_at_the_stop(
    text: TextCodec, ids: list[int], stops: list[str], group: int
) -> None:
    answer = joined(run(text, ids, stops, group)[0])
    whole = text.tokenizer.decode(ids)
    found = [(at + len(stop), at, stop) for stop in stops if (at := whole.find(stop)) >= 0]
    if found:
        assert (answer.text, answer.stop_reason) == (whole[: min(found)[1]], min(found)[2])
    else:
        assert (answer.text, answer.stop_reason) == (whole, None)
        assert answer.token_ids == ids


def rule(text: TextCodec, *, thinks: bool = True, opened: bool = False, names: tuple[str, ...] = ("f",)) -> ParseRule:
    tags = {token_id: name for name, token_id in tag_ids(text.tokenizer).items()}
    return ParseRule(tags, thinks, opened, frozenset(names), single=False)


def parts_of(deltas: list[Delta]) -> tuple[str, str, dict[int, str]]:
    """Reasoning, content and the calls that stand."""
    reasoning = content = ""
    calls: dict[int, str] = {}
    for part in [part for delta in deltas for part in delta.parts]:
        match part:
            case ReasoningPart(more):
                reasoning += more
            case TextPart(more):
                content += more
            case CallPart(index, name, arguments):
                calls[index] = calls.get(index, "") + (name or "") + arguments
            case RevokedPart(index):
                del calls[index]
    return reasoning, content, calls


def spelled(text: TextCodec, letters: str) -> list[int]:
    """A text in tokens that are no tags."""
    return [token for letter in letters for token in text.tokenizer.encode(letter)]


WORDS = ["\n", " ", "a", '{"name": "f", "arguments": {"x": "', '"}}', "{}"]
SAID = st.lists(st.tuples(st.sampled_from([*TAGS, *TAGS, *WORDS]), st.booleans()), max_size=14)


@given(
    said=SAID,
    stops=st.lists(st.sampled_from(["call>", "<think>", "k>\n", "\n", "a", "a\n", '"x']), max_size=2),
    group=st.integers(2, 9),
    opened=st.booleans(),
    include=st.booleans(),
)
def test_parts_do_not_depend_on_the_events(
    text: TextCodec, said: list[tuple[str, bool]], stops: list[str], group: int, opened: bool, include: bool
) -> None:
    """Tags in their own tokens or letter by letter, and stop strings that hold text back."""
    ids = [token for word, own in said for token in (text.tokenizer.encode(word) if own else spelled(text, word))]
    options = {"parse": rule(text, opened=opened), "include_stop": include}
    one = run(text, ids, stops, 1, **options)[0]
    many = run(text, ids, stops, group, **options)[0]
    assert parts_of(one) == parts_of(many)
    assert sum(delta.reasoning_tokens for delta in one) == sum(delta.reasoning_tokens for delta in many)
    assert joined(one).token_ids == joined(many).token_ids
    assert joined(one).finish_reason == joined(many).finish_reason
    assert joined(one).stop_reason == joined(many).stop_reason


def test_tags_spelled_out_are_text(text: TextCodec) -> None:
    said = f'{THINK}a{THINK_END}{CALL}\n{{"name": "f", "arguments": {{}}}}\n{CALL_END}'
    deltas, _ = run(text, spelled(text, said), [], 3, parse=rule(text))
    assert parts_of(deltas) == ("", said, {})
    deltas, _ = run(text, text.tokenizer.encode(said), [], 3, parse=rule(text))
    assert parts_of(deltas) == ("a", "", {0: "f{}"})


def test_the_thinking_goes_on_past_a_tag_spelled_out(text: TextCodec) -> None:
    ids = [*spelled(text, f"a{THINK_END}b"), *text.tokenizer.encode(f"{THINK_END}c")]
    deltas, _ = run(text, ids, [], 2, parse=rule(text, opened=True))
    assert parts_of(deltas) == (f"a{THINK_END}b", "c", {})
    assert sum(delta.reasoning_tokens for delta in deltas) == len(ids) - 1


def test_a_tag_that_is_the_stop_token_closes_its_part(text: TextCodec) -> None:
    end = tag_ids(text.tokenizer)[CALL_END]
    ids = text.tokenizer.encode(f'{CALL}\n{{"name": "f", "arguments": {{}}}}\n')
    events = events_of(Request("r", (5,), 1000, Sampling(), frozenset({end})), ids)
    call = Call(Request("r", (5,), 1000, Sampling()), include_stop=True, parse=rule(text))
    answer = Answer(call, text.tokenizer)
    deltas = [answer.push(event) for event in events]
    assert parts_of(deltas) == ("", "", {0: "f{}"})
    assert deltas[-1].finish_reason == "tool_calls"


def test_special_tags_work_without_being_shown(text: TextCodec, tmp_path: Path) -> None:
    """In some models the tags are special tokens, which are no part of the text unless it is asked for."""
    write_random_tokenizer(tmp_path, 600, 512)
    content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    for token in content["added_tokens"]:
        token["special"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    special = Tokenizer.load(tmp_path)
    ids = special.encode(f'{THINK}a{THINK_END}b{CALL}{{"name": "f", "arguments": {{}}}}{CALL_END}')
    for shown in (False, True):
        call = Call(Request("r", (5,), 1000, Sampling()), skip_special=not shown, parse=rule(text))
        answer = Answer(call, special)
        deltas = [answer.push(event) for event in events_of(call.request, ids)]
        assert parts_of(deltas) == ("a", "b", {0: "f{}"})
        deltas = [Answer(replace(call, parse=None), special).push(event) for event in events_of(call.request, ids[:1])]
        assert joined(deltas).text == (THINK if shown else "")


def parse(events: bytes) -> list[dict[str, Any]]:
    return [
        json.loads(event.removeprefix(b"data: "))
        for event in events.split(b"\n\n")
        if event not in (b"", b"data: [DONE]")
    ]


@given(ids=IDS, stops=STOPS, group=st.integers(1, 9), logprobs=st.sampled_from([None, 0, 2]), token_ids=st.booleans())
def test_completion_streamed_equals_whole(
    text: TextCodec, ids: list[int], stops: list[str], group: int, logprobs: int | None, token_ids: bool
) -> None:
    deltas, call = run(text, ids, stops, group, logprobs=logprobs, echo=True)
    body = CompletionBody(model="m", prompt="x", echo=True, logprobs=logprobs, return_token_ids=token_ids)
    writer = CompletionWriter(body, [call], "m", text.tokenizer, "fp")
    whole = json.loads(writer.whole([joined(deltas)]))["choices"][0]
    chunks = parse(b"".join(writer.chunk(0, delta) for delta in deltas) + writer.closing())
    choices = [chunk["choices"][0] for chunk in chunks]
    assert "".join(choice["text"] for choice in choices) == whole["text"]
    assert choices[-1]["finish_reason"] == whole["finish_reason"]
    if logprobs is not None:
        for name in whole["logprobs"]:
            assert [item for choice in choices for item in choice["logprobs"][name]] == whole["logprobs"][name]
    if token_ids:
        assert [item for choice in choices for item in choice["token_ids"]] == whole["token_ids"]


@given(ids=IDS, stops=STOPS, group=st.integers(1, 9), logprobs=st.sampled_from([None, 0, 2]))
def test_chat_streamed_equals_whole(
    text: TextCodec, ids: list[int], stops: list[str], group: int, logprobs: int | None
) -> None:
    deltas, call = run(text, ids, stops, group, logprobs=logprobs)
    messages = [{"role": "user", "content": "x"}]
    body = ChatBody.model_validate(
        {"model": "m", "messages": messages, "logprobs": logprobs is not None, "stream": True}
    )
    writer = ChatWriter(body, [call], "m", text.tokenizer, "fp")
    whole = json.loads(writer.whole([joined(deltas)]))["choices"][0]
    events = writer.opening() + b"".join(writer.chunk(0, delta) for delta in deltas) + writer.closing()
    choices = [chunk["choices"][0] for chunk in parse(events)]
    assert choices[0]["delta"]["role"] == "assistant"
    assert "".join(choice["delta"].get("content", "") for choice in choices) == whole["message"]["content"]
    assert [choice["finish_reason"] for choice in choices[:-1]] == [None] * (len(choices) - 1)
    assert choices[-1]["finish_reason"] == whole["finish_reason"]
    if logprobs is not None:
        streamed = [entry for choice in choices if choice["logprobs"] for entry in choice["logprobs"]["content"]]
        assert streamed == whole["logprobs"]["content"]


def test_minus_infinity_is_valid_json(http: httpx.Client, engine: FakeEngine) -> None:

    never = TokenLogprob(40, float("-inf"), ((41, float("-inf")),))
    engine.script = lambda request: [TokenEvent(request.request_id, (40,), (never,), finish_reason="length")]
    body = {"model": "test-model", "prompt": "x", "logprobs": 1, "max_tokens": 1}
    reply = http.post("/v1/completions", json=body)
    assert json.loads(reply.text, parse_constant=lambda name: pytest_fail(name))["choices"][0]["logprobs"][
        "token_logprobs"
    ] == [-9999.0]


def pytest_fail(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")
