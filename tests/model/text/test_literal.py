"""Marked text answers as the plain text does, and keeps its marks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from divisi.model.text import TemplateError
from divisi.model.text.literal import MARKS, Literal, Marks

LETTERS = "<>|ab"
MARKING = Marks(LETTERS, "")
TEXTS = st.text(st.sampled_from("<>|abA x\n\tßé"), max_size=12)
ASKED: dict[str, Callable[[Any, str], Any]] = {
    "in": lambda text, part: part in text,
    "equal": lambda text, part: (text == part, text != part, part == text, hash(text) == hash(part)),
    "order": lambda text, part: sorted([text, part]) == sorted([part, text]),
    "in a list": lambda text, part: (text in [part], part in [text], {part: 1}.get(text)),
    "ends": lambda text, part: (text.startswith(part), text.endswith((part, "x")), text.count(part)),
    "find": lambda text, part: (text.find(part), text.rfind(part), len(text), bool(text), text.isspace()),
}
CUT: dict[str, Callable[[Any, str], Any]] = {
    "split": lambda text, part: text.split(part or "a"),
    "split once": lambda text, part: text.split(part or "a", 1) + text.rsplit(sep=part or "a", maxsplit=1),
    "words": lambda text, part: text.split() + text.rsplit(None, 1) + text.split(maxsplit=1),
    "lines": lambda text, part: text.splitlines() + text.splitlines(True),
    "strip": lambda text, part: [text.strip(), text.lstrip("<a "), text.rstrip(part), text.strip(part)],
    "affixes": lambda text, part: [text.removeprefix(part), text.removesuffix(part)],
    "partition": lambda text, part: [*text.partition(part or "b"), *text.rpartition(part or "b")],
    "slice": lambda text, part: [text[1:], text[:3], text[::-1], text[len(part) :], text[:1]],
    "replace": lambda text, part: [text.replace(part, "<|"), text.replace("a", part, 2), text.replace("a", "")],
    "join": lambda text, part: [text + part, part + text, f"{part}{text}", str(text), "|".join([text, part])],
    "case": lambda text, part: [text.upper(), text.lower(), text.title(), text.capitalize()],
}


@pytest.mark.parametrize("name", ASKED)
@given(plain=TEXTS, part=TEXTS)
def test_questions(name: str, plain: str, part: str) -> None:
    text, marked_part = MARKING.mark(plain), MARKING.mark(part)
    assert ASKED[name](text, part) == ASKED[name](plain, part) == ASKED[name](text, marked_part)


@pytest.mark.parametrize("name", CUT)
@given(plain=TEXTS, part=TEXTS)
def test_pieces(name: str, plain: str, part: str) -> None:
    found = CUT[name](MARKING.mark(plain), part)
    assert [MARKING.unmark(str(piece)) for piece in found] == CUT[name](plain, part)
    for piece in found:
        raw = "".join([*piece])
        if isinstance(piece, Literal):
            assert (len(raw), raw.translate(MARKING._letters)) == (len(piece.plain), piece.plain)
        if name not in ("replace", "join"):
            assert not set(raw) & set(LETTERS), "a letter has lost its mark"


def test_values_are_marked_however_deep() -> None:
    value = {"a": ["<", {"b": ("|", 1, None, True)}]}
    marked = MARKING.mark(value)
    assert marked == {"a": ["<", {"b": ["|", 1, None, True]}]}
    assert "".join([*marked["a"][1]["b"][0]]) not in LETTERS


def test_a_mark_is_no_character_of_the_text() -> None:
    assert not set(Marks("ab", chr(MARKS[0]) + chr(MARKS[1])).mark("ab")) & set(map(chr, MARKS[:2]))
    with pytest.raises(TemplateError, match="different characters"):
        Marks("ab", map(chr, MARKS))
