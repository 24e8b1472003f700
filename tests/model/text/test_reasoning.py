from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from divisi.model.text.reasoning import ReasoningSplitter, leaves_open
from tests.model.text.test_tool_calls import cut


def split(pieces: Iterable[str], *, opened: bool) -> tuple[str, str]:
    splitter = ReasoningSplitter(opened=opened)
    parts = [splitter.push(piece) for piece in pieces]
    parts.append(splitter.finish())
    return "".join(part.reasoning for part in parts), "".join(part.content for part in parts)


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
    assert split([text], opened=opened) == (reasoning, content)


tagged = st.lists(
    st.sampled_from(["<think>", "</think>", "\n", " ", "<", "<thi", "</th", "think>", "a", "é你"]), max_size=14
).map("".join)


@given(tagged, st.booleans(), st.data())
def test_any_cut_gives_the_same(text: str, opened: bool, data: st.DataObject) -> None:
    whole = split([text], opened=opened)
    assert split(cut(text, data), opened=opened) == whole
    assert split(list(text), opened=opened) == whole


@given(st.text(), st.text(), st.booleans())
def test_parts_come_back(reasoning: str, content: str, opened: bool) -> None:
    reasoning, content = reasoning.replace("think>", "").strip("\n"), content.lstrip("\n")
    text = ("" if opened else "<think>\n") + reasoning + "\n</think>\n\n" + content
    assert split(list(text), opened=opened) == (reasoning, content)


def test_prompts_that_leave_the_tag_open() -> None:
    assert leaves_open("<|im_start|>assistant\n<think>\n")
    assert not leaves_open("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert not leaves_open("<|im_start|>assistant\n")
