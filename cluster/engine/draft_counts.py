"""How many tokens were drafted, and stood, by their place in a step and by the part of an answer. Imports no torch."""

from __future__ import annotations

from itertools import accumulate
from typing import Literal, get_args

Slice = Literal["chat", "tools"]
"""Of an answer: its calls, and all else."""


class DraftCounts:
    """Totals; a key is the slice and the place, as in `chat 1`."""

    def __init__(self) -> None:
        self._deep: dict[Slice, list[int]] = {part: [] for part in get_args(Slice)}
        """Steps of a sequence with so many drafts, by their number less one."""
        self._stood: dict[Slice, list[int]] = {part: [] for part in get_args(Slice)}
        """The same by how many stood."""

    def note(self, part: Slice, drafted: int, accepted: int) -> None:
        """A step drafted so many tokens for a sequence, at least one, of which the first `accepted` stood."""
        deep, stood = self._deep[part], self._stood[part]
        while len(deep) < drafted:
            deep.append(0)
            stood.append(0)
        deep[drafted - 1] += 1
        if accepted:
            stood[accepted - 1] += 1

    @property
    def drafted(self) -> dict[str, int]:
        """Tokens that were drafted at each place."""
        return _by_place(self._deep)

    @property
    def accepted(self) -> dict[str, int]:
        """Those that stood."""
        return _by_place(self._stood)


def _by_place(counts: dict[Slice, list[int]]) -> dict[str, int]:
    """Of how many reached a place at least."""
    found: dict[str, int] = {}
    for part, by_depth in counts.items():
        reached = reversed([*accumulate(reversed(by_depth))])
        found |= {f"{part} {place}": count for place, count in enumerate(reached, 1)}
    return found
