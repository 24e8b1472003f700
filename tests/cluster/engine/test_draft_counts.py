"""Drafts are counted by place, and by the part of an answer."""

from __future__ import annotations

import random
from collections import Counter

from divisi.cluster.engine.draft_counts import DraftCounts, Slice


def test_each_place_counts_by_itself() -> None:
    counts, rng = DraftCounts(), random.Random(1)
    drafted: Counter[str] = Counter()
    accepted: Counter[str] = Counter()
    for _ in range(300):
        part: Slice = rng.choice(("chat", "tools"))
        deep = rng.randint(1, 8)
        stood = rng.randint(0, deep)
        counts.note(part, deep, stood)
        for place in range(1, deep + 1):
            drafted[f"{part} {place}"] += 1
            accepted[f"{part} {place}"] += place <= stood
    assert counts.drafted == drafted
    assert counts.accepted == accepted


def test_what_was_never_drafted_is_not_there() -> None:
    counts = DraftCounts()
    assert not counts.drafted
    counts.note("chat", 2, 0)
    assert counts.drafted == {"chat 1": 1, "chat 2": 1}
    assert counts.accepted == {"chat 1": 0, "chat 2": 0}
