"""What was measured of steps.

Seconds of a draft pass depend on its rows, and on whether it is a step's first: that one finds the layer's weights in
no cache, and what lays out all of them counts with it. Those of all else in a step (planning, the full pass, choosing
tokens) depend on how many sequences decode and on the rows of each: two tokens touch twice the experts of one, forty
mostly the same, at some sizes kernels change, and each sequence has a state to be read and written whatever its rows.
To both comes what attention reads: the tokens before each row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple


class Reading(NamedTuple):
    """Seconds that a row takes longer for each token before it."""

    first: float = 0.0
    """The first row of a sequence in a full pass."""
    more: float = 0.0
    """Each further one, which shares the reading."""
    draft: float = 0.0
    """A row of a draft pass."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Seconds of steps that have run."""

    full: Mapping[int, Mapping[int, float]] = field(default_factory=dict)
    """Of all but drafts, by decoding sequences and rows of each, at the beginning of their texts."""
    draft: Mapping[int, float] = field(default_factory=dict)
    """Of a draft pass after a step's first, by its rows."""
    reading: Reading = field(default_factory=Reading)
    first: Mapping[int, float] = field(default_factory=dict)
    """Of a step's first draft pass with all that precedes it, by its rows; empty: as the others."""
