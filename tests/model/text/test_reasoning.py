from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from divisi.model.text.reasoning import ReasoningSplitter
from divisi.model.text.tags import CALL, THINK, THINK_END, Segment, Tag
from tests.model.text.test_tool_calls import cut, letters
from tests.support.tagged import tagged


def split(segments: Iterable[Segment], *, opened: bool) -> tuple[str, str]:
    splitter = ReasoningSplitter(opened=opened)
    parts = [splitter.push(segment) for segment in segments]
    parts.append(splitter.finish())
    content = [segment.text if isinstance(segment, Tag) else segment for part in parts for segment in part.content]
    return "".join(part.reasoning for part in parts), "".join(content)


@pytest.mark.parametrize(
    ("opened", "text", "reasoning", "content"),
    [
        (False, "<think>\nHm.\n\nYes.\n</think>\n\nIt is.", "Hm.\n\nYes.", "It is."),
        (False, "\n <think>Hm.</think>It is.", "Hm.", "It is."),
        (True, "Hm.\n</think>\n\nIt is.", "Hm.", "It is."),
        (True, "<think>\nHm.\n</think>\n\nIt is.", "Hm.", "It is."),
        (True, "</think>It is.", "", "It is."),
        (True, "Hm. And", "Hm. And", ""),
        (False, "<think>\nHm. </thi", "Hm. </thi", ""),
        (False, "It is. <think>no</think>", "", "It is. <think>no</think>"),
        (False, "<thin", "", "<thin"),
        (False, "\n\nIt is.", "", "\n\nIt is."),
        (False, "<think>\n\n</think>\n\n", "", ""),
        (True, "<b>a</b></think>x</think>", "<b>a</b>", "x</think>"),
        (False, "", "", ""),
    ],
)
def test_split(opened: bool, text: str, reasoning: str, content: str) -> None:
    assert split(tagged(text), opened=opened) == (reasoning, content)


tagged_texts = st.lists(
    st.sampled_from(["<think>", "</think>", "\n", " ", "<", "<thi", "</th", "think>", "a", "é你"]), max_size=14
).map("".join)


@given(tagged_texts, st.booleans(), st.data())
def test_any_cut_gives_the_same(text: str, opened: bool, data: st.DataObject) -> None:
    whole = split(tagged(text), opened=opened)
    assert split(cut(tagged(text), data), opened=opened) == whole
    assert split(letters(tagged(text)), opened=opened) == whole


@given(st.text() | st.just(f"a {THINK_END}"), st.text() | st.just(f"{THINK}b{THINK_END}"), st.booleans())
def test_parts_come_back(reasoning: str, content: str, opened: bool) -> None:
    reasoning, content = reasoning.strip("\n"), content.lstrip("\n")
    opening: list[Segment] = [] if opened else [Tag(THINK, THINK), "\n"]
    said = [*opening, *reasoning, "\n", Tag(THINK_END, THINK_END), "\n\n", *content]
    assert split(said, opened=opened) == (reasoning, content)


def test_another_tag_in_the_thinking_is_text() -> None:
    assert split(tagged(f"{THINK}a{CALL}b{THINK_END}c"), opened=False) == (f"a{CALL}b", "c")
