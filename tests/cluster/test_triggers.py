"""Where an answer stands, by its tokens."""

from __future__ import annotations

import random

import pytest

from divisi.cluster.triggers import Span, Triggers

THINK, THOUGHT, CALL, CALLED = 1, 2, 3, 4
THINKING, OPENED = Span(THINK, THOUGHT, leading=True), Span(THINK, THOUGHT, opened=True, leading=True)
CALLING = Span(CALL, CALLED)


@pytest.mark.parametrize(
    ("spans", "tokens", "outside"),
    [
        ((), [CALL, 7, CALLED], "111"),
        ((CALLING,), [7, CALL, 8, 9, CALLED, 7], "110011"),
        ((CALLING,), [CALL, CALL, CALLED, CALLED, CALL, 7], "101110"),
        ((CALLING,), [CALL, THINK, THOUGHT, 7], "1000"),
        ((CALLING,), [7, CALLED, 8], "111"),
        ((THINKING,), [THINK, 7, THOUGHT, 8], "1011"),
        ((THINKING,), [7, THINK, 8], "111"),
        ((THINKING,), [THINK, THOUGHT, THINK, 7], "1111"),
        ((OPENED,), [7, THOUGHT, 8, THINK, 9], "01111"),
        ((OPENED,), [THINK, 7, THOUGHT, THINK, 7], "00111"),
        ((OPENED, CALLING), [7, CALL, CALLED, THOUGHT, CALL, 7, CALLED, 8], "00011011"),
        ((THINKING, CALLING), [CALL, THINK, CALLED, THINK, 7], "10111"),
    ],
)
def test_which_tokens_stand_outside(spans: tuple[Span, ...], tokens: list[int], outside: str) -> None:
    triggers = Triggers(spans)
    assert "".join(str(int(triggers.take(token))) for token in tokens) == outside


def test_inside_is_the_span_of_the_next_token() -> None:
    triggers = Triggers((OPENED, CALLING))
    found = [triggers.inside]
    for token in [7, THOUGHT, CALL, 8, CALLED]:
        triggers.take(token)
        found.append(triggers.inside)
    assert found == [OPENED, OPENED, None, CALLING, CALLING, None]


@pytest.mark.parametrize("seed", range(20))
def test_any_answer_equals_a_search_through_its_text(seed: int) -> None:
    """The oracle cuts the whole answer at once; tokens as characters."""
    rng = random.Random(seed)
    opened = rng.random() < 0.5
    tokens = [rng.choice([THINK, THOUGHT, CALL, CALLED, 7]) for _ in range(40)]
    triggers = Triggers((OPENED if opened else THINKING, CALLING))
    assert [triggers.take(token) for token in tokens] == _oracle(tokens, opened), f"seed {seed}"


def _oracle(tokens: list[int], opened: bool) -> list[bool]:
    outside = [True] * len(tokens)

    def close(start: int, end_token: int) -> int:
        end = tokens.index(end_token, start) if end_token in tokens[start:] else len(tokens)
        outside[start:end] = [False] * (end - start)
        return end + 1

    at = close(0, THOUGHT) if opened else close(1, THOUGHT) if tokens[0] == THINK else 0
    while CALL in tokens[at:]:
        at = close(tokens.index(CALL, at) + 1, CALLED)
    return outside
