"""How many tokens were drafted, and stood, by their place in a step and by the part of an answer. Imports no torch."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

Slice = Literal["chat", "tools"]
"""Of an answer: its calls, and all else."""


@dataclass(slots=True)
class DraftCounts:
    """Totals; a key is the slice and the place, as in `chat 1`."""

    drafted: Counter[str] = field(default_factory=Counter)
    accepted: Counter[str] = field(default_factory=Counter)

    def note(self, part: Slice, drafted: int, accepted: int) -> None:
        """A step drafted so many tokens for a sequence, of which the first `accepted` stood."""
        for place in range(1, drafted + 1):
            self.drafted[f"{part} {place}"] += 1
            self.accepted[f"{part} {place}"] += place <= accepted
