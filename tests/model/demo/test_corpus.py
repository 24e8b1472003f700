"""Conversations: seeded, in the form that the server's parsers read, and without words that cross the splits."""

from __future__ import annotations

import json
import re
from itertools import combinations
from pathlib import Path
from random import Random
from typing import get_args

import jsonschema
import pytest
from tokenizers import Tokenizer

from divisi.model.demo import checkpoint_dir
from divisi.model.demo.corpus import words as lists
from divisi.model.demo.corpus.chat import exchange, sum_of
from divisi.model.demo.corpus.conversation import Conversation, render
from divisi.model.demo.corpus.everyday import everyday_tool
from divisi.model.demo.corpus.mixture import busy_tools, make_conversation
from divisi.model.demo.corpus.recall import make_recall, make_running_recall
from divisi.model.demo.corpus.words import CROWDS, NOUNS, PARAMETERS, VERBS, Split, Words, split_of, words_of
from divisi.model.demo.evaluation.cases import SKILLS, make_cases
from divisi.model.text.reasoning import ReasoningSplitter
from divisi.model.text.template import ChatTemplate
from divisi.model.text.tool_calls import CallPart, Part, TextPart, ToolCallParser
from tests.support.tagged import tagged

SPLITS: tuple[Split, ...] = get_args(Split)
TEMPLATE = ChatTemplate((Path(lists.__file__).parent.parent / "chat_template.jinja").read_text(encoding="utf-8"))


def conversations(split: Split, count: int = 150) -> list[Conversation]:
    words = Words(Random(17), split)
    return [make_conversation(words, words.random.choice((100, 256, 512))) for _ in range(count)]


def test_the_same_seed_gives_the_same_conversations() -> None:
    assert conversations("train", 20) == conversations("train", 20)


def test_splits_share_no_drawn_word_and_no_phrasing() -> None:
    drawn: dict[Split, set[str]] = {}
    for split in SPLITS:
        words = Words(Random(5), split)
        kinds = (words.verb, words.noun, words.proper, words.invented)
        drawn[split] = {kind().lower() for kind in kinds for _ in range(1500)}
        drawn[split] |= {
            "|".join(words.phrasing(("a", "b", "c", "d"), ("e", "f", "g", "h"), "ijklmn")) for _ in range(300)
        }
        assert all(split_of(word) == split for word in drawn[split])
    for one, other in combinations(SPLITS, 2):
        assert not drawn[one] & drawn[other]


def test_every_list_has_words_for_all_splits() -> None:
    for values in (lists.VERBS, lists.NOUNS, lists.PARAMETERS, lists.ADJECTIVES, lists.NAMES, lists.CITIES):
        assert min(len(lists.words_of(tuple(values), split)) for split in SPLITS) >= 7


def test_a_crowd_is_as_small_as_another_split() -> None:
    for words in (VERBS, NOUNS, PARAMETERS):
        crowds = [words_of(tuple(words), "train", crowd) for crowd in range(CROWDS)]
        assert sorted(word for crowd in crowds for word in crowd) == sorted(words_of(tuple(words), "train"))
        size = len(words_of(tuple(words), "dev"))
        assert all(size / 2 < len(crowd) < size * 2 for crowd in crowds)


def test_everyday_tools_are_in_one_split_each() -> None:
    names: dict[Split, set[str]] = {}
    for split in SPLITS:
        words = Words(Random(4), split)
        names[split] = {everyday_tool(words).name for _ in range(400)}
        assert len(names[split]) >= 8
    for one, other in combinations(SPLITS, 2):
        assert not names[one] & names[other]


def test_busy_talk_is_mostly_calls() -> None:
    words = Words(Random(6), "train")
    for length in (128, 256, 512, 1024):
        talks = [busy_tools(words, length) for _ in range(60)]
        asked = [sum(message["role"] == "user" for message in talk.messages) for talk in talks]
        called = [sum("tool_calls" in message for message in talk.messages) for talk in talks]
        assert min(asked) >= 1
        assert sum(called) > 0.8 * sum(asked)
        assert length / 260 < sum(asked) / len(talks) < length / 50


@pytest.mark.parametrize("split", SPLITS)
def test_small_talk_ends_in_every_split(split: Split) -> None:
    """Some questions have no phrasing in a small split; then another one is asked."""
    words = Words(Random(29), split)
    asked = {exchange(words)[0].lower() for _ in range(3000)}
    assert len(asked) > 50


def test_no_phrasing_in_a_split_is_an_error() -> None:
    other = next(split for split in SPLITS if split != split_of("only|this"))
    with pytest.raises(ValueError, match="no combination"):
        Words(Random(1), other).phrasing(("only",), ("this",))


def test_sums_are_right_and_their_numbers_held_out() -> None:
    words = Words(Random(7), "held_out")
    for _ in range(300):
        _, answer, _ = sum_of(words)
        a, sign, b, result = re.fullmatch(r"(\d+) (.) (\d+) = (\d+)\.", answer).groups()  # type: ignore[union-attr]
        assert int(result) == {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign]
        assert split_of(f"{a}{sign}{b}") == "held_out"


def test_arguments_follow_the_schema_of_their_tool() -> None:
    found = 0
    for talk in conversations("train"):
        schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in talk.tools}
        for message in talk.messages:
            for call in message.get("tool_calls", []):
                jsonschema.validate(call["function"]["arguments"], schemas[call["function"]["name"]])
                found += 1
    assert found > 50


def test_what_is_trained_is_what_the_parsers_read() -> None:
    found = 0
    for talk in conversations("train"):
        last = talk.messages[-1]
        if "tool_calls" not in last:
            continue
        text = render(TEMPLATE, talk, thinks=True)
        prompt = TEMPLATE.render(talk.messages[:-1], tools=talk.tools, enable_thinking=True)
        assert text.startswith(prompt)
        splitter = ReasoningSplitter(opened=True)
        parser = ToolCallParser([tool["function"]["name"] for tool in talk.tools])
        parts: list[Part] = []
        reasoning = ""
        for segment in tagged(text[len(prompt) :].removesuffix("<|im_end|>\n")):
            thought, content = splitter.push(segment)
            reasoning += thought
            parts += [part for piece in content for part in parser.push(piece)]
        parts += parser.finish()
        assert reasoning == talk.thoughts[len(talk.messages) - 1]
        assert not parser.broken
        assert not [part for part in parts if isinstance(part, TextPart) and part.text]
        calls: dict[int, list[str]] = {}
        for part in parts:
            assert isinstance(part, CallPart)
            calls.setdefault(part.index, ["", ""])[1] += part.arguments
            calls[part.index][0] += part.name or ""
        wanted = [(call["function"]["name"], call["function"]["arguments"]) for call in last["tool_calls"]]
        assert [(name, json.loads(arguments)) for name, arguments in calls.values()] == wanted
        found += 1
    assert found > 20


@pytest.mark.parametrize(("facts", "questions", "filler"), [(1, 1, 0), (1, 3, 0), (3, 1, 4), (6, 6, 0), (12, 8, 60)])
def test_running_recall_asks_for_what_was_told(facts: int, questions: int, filler: int) -> None:
    words = Words(Random(8), "train")
    for _ in range(30):
        talk = make_running_recall(words, facts, questions, filler)
        told = ""
        for said, answer in zip(talk.messages[::2], talk.messages[1::2], strict=True):
            told += said["content"]
            attribute, name, value = re.fullmatch(r"The (.+) of (.+) is (.+)\.", answer["content"]).groups()  # type: ignore[union-attr]
            assert all(part in told for part in (attribute, name, value))
            assert attribute in said["content"]
            assert name in said["content"]
        assert 1 <= len(talk.messages) // 2 <= questions


def test_facts_asked_for_are_in_the_text_once() -> None:
    words = Words(Random(3), "held_out")
    for _ in range(30):
        talk = make_recall(words, facts=6, questions=1, filler=20)
        text = next(message["content"] for message in talk.messages)
        value = talk.messages[-1]["content"].removesuffix(".").split(" is ", 1)[1]
        assert value in text


@pytest.mark.parametrize("skill", SKILLS)
def test_cases_end_before_the_answer(skill: str) -> None:
    for case in make_cases(skill, 3, 0):
        assert case.messages[-1]["role"] in ("user", "tool")
        assert bool(case.text) != bool(case.calls)
        assert case.calls == [] or case.tools


@pytest.mark.parametrize(("skill", "tokens"), [("recall 1k", 1024), ("recall 4k", 4096), ("recall 8k", 8192)])
def test_recall_is_over_as_many_tokens_as_its_name_says(skill: str, tokens: int) -> None:
    tokenizer = Tokenizer.from_file(str(checkpoint_dir() / "tokenizer.json"))
    counts = [len(tokenizer.encode(TEMPLATE.render(case.messages)).ids) for case in make_cases(skill, 40, 0)]
    assert 0.98 < sum(counts) / len(counts) / tokens < 1.04


def test_the_template_shows_tools_in_short_and_takes_foreign_ones() -> None:
    nested = {"type": "object", "properties": {"x": {"type": "integer"}}}
    parameters = {
        "type": "object",
        "properties": {
            "city": {"type": "string", "description": "Where."},
            "unit": {"enum": ["c", "f"]},
            "where": nested,
            "days": {"type": "array", "items": {"type": "string"}},
            "any": {},
        },
        "required": ["city", "where", "days", "any"],
    }
    text = TEMPLATE.render(
        [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}],
        tools=[{"type": "function", "function": {"name": "f", "parameters": parameters}}, {"function": {"name": "g"}}],
        enable_thinking=True,
    )
    rest = f'"where": {json.dumps(nested)}, "days": ["string"], "any": {{}}'
    shown = f'{{"city": "string", "unit": ["c", "f", null], {rest}}}'
    assert text == (
        "<|im_start|>system\nBe kind.\n\n# Tools\n<tools>\n"
        f'{{"name": "f", "arguments": {shown}}}\n{{"name": "g", "arguments": {{}}}}\n</tools><|im_end|>\n'
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n"
    )


def test_the_packaged_template_is_the_one_trained_on() -> None:
    assert (checkpoint_dir() / "chat_template.jinja").read_bytes() == (
        checkpoint_dir().with_name("chat_template.jinja").read_bytes()
    )
