from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from divisi.model.text.tags import CALL, CALL_END, THINK, Segment, Tag
from divisi.model.text.tool_calls import CallPart, RevokedPart, TextPart, ToolCallParser
from tests.model.text.test_json_scan import values
from tests.support.tagged import pieces, tagged

NAMES = ("weather", "time", "a.b-c")


class Gathered:
    """What a client makes of the parts."""

    def __init__(self, segments: Sequence[Segment], *, single: bool = False) -> None:
        self.text = ""
        self.calls: dict[int, list[str]] = {}
        self.revoked: list[int] = []
        self.parser = ToolCallParser(NAMES, single=single)
        for segment in segments:
            self._take(self.parser.push(segment))
        self._take(self.parser.finish())

    def _take(self, parts: Sequence[object]) -> None:
        for part in parts:
            match part:
                case TextPart(text):
                    self.text += text
                case CallPart(index, name, arguments):
                    assert (name is not None) == (index not in self.calls), "the name comes once, first"
                    if name is not None:
                        self.calls[index] = [name, ""]
                    self.calls[index][1] += arguments
                case RevokedPart(index):
                    self.revoked.append(index)

    @property
    def whole(self) -> list[tuple[str, str]]:
        return [(name, arguments) for index, (name, arguments) in self.calls.items() if index not in self.revoked]

    def state(self) -> object:
        return self.text, self.calls, self.revoked, self.parser.calls, self.parser.broken, self.parser.done


def body(name: str, arguments: str, *, swapped: bool = False) -> str:
    members = [f'"name": {json.dumps(name)}', f'"arguments": {arguments}']
    return "\n{" + ", ".join(reversed(members) if swapped else members) + "}\n"


def block(name: str, arguments: str, *, swapped: bool = False) -> str:
    return CALL + body(name, arguments, swapped=swapped) + CALL_END


def cut(segments: Sequence[Segment], data: st.DataObject) -> list[Segment]:
    size = sum(len(segment) for segment in segments if isinstance(segment, str))
    return pieces(segments, data.draw(st.lists(st.integers(0, size), max_size=12)))


def letters(segments: Sequence[Segment]) -> list[Segment]:
    return [part for segment in segments for part in ([segment] if isinstance(segment, Tag) else segment)]


arguments_texts = st.builds(
    lambda value, ascii_only, indent: json.dumps(value, ensure_ascii=ascii_only, indent=indent),
    st.dictionaries(st.text() | st.sampled_from(["</tool_call>", "<tool_call>", '"\\']), values, max_size=4),
    st.booleans(),
    st.sampled_from([None, 2]),
)
plain_texts = st.text(alphabet='ab <>\n{}/_"\\tool_call你') | st.text()


@given(st.lists(st.tuples(st.sampled_from(NAMES), arguments_texts, st.booleans()), max_size=3), plain_texts, st.data())
def test_calls_come_back_as_written(calls: list[tuple[str, str, bool]], before: str, data: st.DataObject) -> None:
    """Whatever letters stand before and in them, those of tags too."""
    before = before.rstrip("\n")
    said: list[Segment] = [before]
    for name, arguments, swapped in calls:
        said += ["\n", Tag(CALL, CALL), body(name, arguments, swapped=swapped), Tag(CALL_END, CALL_END)]
    got = Gathered(cut(said, data))
    assert got.whole == [(name, arguments) for name, arguments, _ in calls]
    assert got.text == before
    assert got.parser.calls == len(calls)
    assert not got.parser.broken


fragments = st.lists(
    st.sampled_from(
        [
            "<tool_call>", "</tool_call>", "\n", "{", "}", '"name"', '"arguments"', ":", ",", '"weather"', '"time"',
            "{}", '{"city": "Paris"}', "text", "<", "<tool", '{"name": "weather", "arguments": {', "\\", "1", " ",
            block("weather", '{"a": [1, {"b": "c"}]}'), block("nowhere", "{}"), block("time", "{} x"),
        ]
    ),
    max_size=12,
).map("".join)  # fmt: skip


@given(fragments | plain_texts, st.booleans(), st.data())
def test_any_cut_gives_the_same(text: str, single: bool, data: st.DataObject) -> None:
    whole = Gathered(tagged(text), single=single)
    assert Gathered(cut(tagged(text), data), single=single).state() == whole.state()
    assert Gathered(letters(tagged(text)), single=single).state() == whole.state()
    assert len(whole.whole) == whole.parser.calls
    assert all(json.loads(arguments) is not None and name in NAMES for name, arguments in whole.whole)


@given(plain_texts)
def test_text_without_a_block_is_untouched(text: str) -> None:
    assert Gathered(list(text)).text == text


@given(plain_texts.filter(lambda text: text.strip("\n")))
def test_letters_of_a_tag_are_text(text: str) -> None:
    said = text + block("weather", "{}")
    got = Gathered([said])
    assert (got.text, got.whole, got.parser.broken) == (said, [], False)


def test_a_tag_in_a_string_of_arguments_is_a_part_of_it() -> None:
    """A model may well use the tag's own token where it quotes one."""
    arguments = json.dumps({"a": f"{CALL_END} {CALL} {THINK}"})
    assert Gathered(tagged(block("weather", arguments))).whole == [("weather", arguments)]


def test_a_call_whose_end_is_spelled_out_is_none() -> None:
    got = Gathered([Tag(CALL, CALL), body("weather", "{}") + CALL_END])
    assert (got.whole, got.text, got.parser.broken) == ([], block("weather", "{}"), True)


def test_tags_that_are_not_shown_work_all_the_same() -> None:
    good, bad = body("weather", "{}"), body("weather", "[]")
    got = Gathered([Tag(CALL, ""), good, Tag(CALL_END, ""), Tag(CALL, ""), bad, Tag(CALL_END, ""), "after"])
    assert (got.whole, got.text) == ([("weather", "{}")], bad + "after")


@pytest.mark.parametrize(
    "broken",
    [
        block("nowhere", "{}"),
        block("weather", '{"city": }'),
        block("weather", '{"city": "Paris"'),
        block("weather", "[]"),
        block("weather", '"{}"'),
        block("weather", '{"a": NaN}'),
        '<tool_call>\n{"name": "weather"}\n</tool_call>',
        '<tool_call>\n{"name": "weather", "arguments": {}, "id": 1}\n</tool_call>',
        '<tool_call>\n{"name": "weather", "name": "time", "arguments": {}}\n</tool_call>',
        '<tool_call>\n{"name": "weather", "arguments": {}} and more </tool_call>',
        "<tool_call>\nnot json\n</tool_call>",
        "<tool_call></tool_call>",
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Par',
        '<tool_call>\n{"name": "wea',
        "<tool_call>",
    ],
)
def test_a_broken_block_is_text(broken: str) -> None:
    got = Gathered(tagged("Well.\n" + broken))
    assert got.whole == []
    assert got.text == "Well.\n" + broken
    assert got.parser.broken


def test_nothing_inside_a_broken_block_is_a_call() -> None:
    inner = block("weather", "{}")
    assert Gathered(tagged("<tool_call>\n{oops " + inner)).whole == []
    got = Gathered(tagged(block("nowhere", "{}") + inner))
    assert got.whole == [("weather", "{}")]
    assert got.text == block("nowhere", "{}")


def test_a_call_after_text_and_a_missing_end() -> None:
    got = Gathered(tagged("Let me see.\n\n" + block("weather", '{"city": "Zürich\\n"}').removesuffix("\n</tool_call>")))
    assert got.text == "Let me see."
    assert got.whole == [("weather", '{"city": "Zürich\\n"}')]


def test_text_after_a_call_stays() -> None:
    got = Gathered(tagged(block("weather", "{}") + "\n\nDone.\n" + block("time", "{}") + "\n"))
    assert got.text == "Done."
    assert [name for name, _ in got.whole] == ["weather", "time"]


def test_single_ends_after_the_first_call() -> None:
    got = Gathered(tagged(block("weather", "{}") + "\n" + block("time", "{}")), single=True)
    assert got.parser.done
    assert got.whole == [("weather", "{}")]


def test_arguments_go_out_as_they_come() -> None:
    parser = ToolCallParser(NAMES)
    parser.push(Tag(CALL, CALL))
    parser.push('\n{"name": "weather", "arguments": ')
    out: list[Any] = []
    for char in '{"city": "Paris"}':
        out += parser.push(char)
    assert [part.arguments for part in out] == list('{"city": "Paris"}')


def test_arguments_wait_for_the_name() -> None:
    parser = ToolCallParser(NAMES)
    parser.push(Tag(CALL, CALL))
    assert parser.push('\n{"arguments": {"city": "Paris"}, "name": "weath') == []
    assert parser.push('er"') == [CallPart(0, "weather", '{"city": "Paris"}')]
