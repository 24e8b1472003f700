"""How much one step changes what is known: less if it was longer, since whatever disturbs a step makes it longer."""

from __future__ import annotations

_WEIGHT = 0.1
"""Of one step in the factors that follow what steps take."""
_LONGEST, _SHORTEST = 1.5, 0.5
"""Times the expected that one step may count as: a process that was put aside for a while says nothing of steps."""
_DISTURBED = 0.25
"""What a correction to longer times counts for, beside one to shorter."""
_READING_CORRECTION = 0.3
"""Of what an unusual step took beside what was expected of it, in what reading costs, which one kind of step was
measured for.
"""


def alike(before: int, read: int) -> bool:
    """Whether two steps read about as many tokens."""
    return before <= 2 * read and read <= 2 * before


def limited(ratio: float) -> float:
    """What a step took to what was expected of it, as it counts."""
    return min(max(ratio, _SHORTEST), _LONGEST)


def trusted(ratio: float) -> float:
    """How much a correction counts for that is by so much."""
    return _DISTURBED if ratio > 1 else 1.0


def followed(scale: float, ratio: float) -> float:
    """A factor after a step that took `ratio` times what is known without it. A longer time counts for as little here
    as in the table, or the two would drift apart.
    """
    to = min(max(ratio, scale * _SHORTEST), scale * _LONGEST)
    return scale + _WEIGHT * trusted(to / scale) * (to - scale)


def corrected_reading(seconds: float, ratio: float, part: float) -> float:
    """What reading a token costs after a step that took `ratio` times the expected, of which this was such a part."""
    return seconds * (1 + trusted(ratio) * _READING_CORRECTION * part * (ratio - 1))
