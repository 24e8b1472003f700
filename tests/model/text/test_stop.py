from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from divisi.model.text import StopMatcher

# Two letters and short strings make overlaps and near misses common.
LETTERS = st.text(alphabet="ab", max_size=30)
STOPS = st.lists(st.text(alphabet="ab", min_size=1, max_size=5), min_size=1, max_size=4)


def cut(text: str, marks: list[int]) -> list[str]:
    places = sorted({min(mark, len(text)) for mark in marks} | {0, len(text)})
    return [text[a:b] for a, b in pairwise(places)]


def expected(text: str, stops: list[str]) -> tuple[str, str | None]:
    """By `str.find` on the whole: the stop string that is complete first, the longest of those."""
    found = [(at + len(stop), at, stop) for stop in stops if (at := text.find(stop)) >= 0]
    if not found:
        return text, None
    _, at, stop = min(found)
    return text[:at], stop


@given(text=LETTERS, stops=STOPS, marks=st.lists(st.integers(0, 30)))
def test_equals_find_on_the_whole(text: str, stops: list[str], marks: list[int]) -> None:
    matcher = StopMatcher(stops)
    out = "".join(matcher.push(piece) for piece in cut(text, marks))
    matched = matcher.matched
    out += matcher.flush()
    assert (out, matched) == expected(text, stops)


@given(text=LETTERS, stop=st.text(alphabet="ab", min_size=1, max_size=6), marks=st.lists(st.integers(0, 30)))
def test_one_stop_string_is_find(text: str, stop: str, marks: list[int]) -> None:
    matcher = StopMatcher([stop])
    out = "".join(matcher.push(piece) for piece in cut(text, marks)) + matcher.flush()
    assert out == text.partition(stop)[0]


@given(text=LETTERS, stops=STOPS)
def test_holds_back_no_more_than_it_must(text: str, stops: list[str]) -> None:
    """What waits is the longest end of the text that may still become a stop string."""
    matcher = StopMatcher(stops)
    out = ""
    for count, char in enumerate(text, start=1):
        out += matcher.push(char)
        if matcher.matched is not None:
            return
        seen = text[:count]
        held = max((n for n in range(count + 1) for s in stops if n < len(s) and seen.endswith(s[:n])), default=0)
        assert out == seen[: count - held]


def test_after_the_match_nothing_comes_out() -> None:
    matcher = StopMatcher(["END"])
    assert matcher.push("a EN") == "a "
    assert matcher.push("D more") == ""
    assert matcher.matched == "END"
    assert matcher.push("again") == ""
    assert matcher.flush() == ""


def test_empty_stop_string() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopMatcher(["a", ""])
