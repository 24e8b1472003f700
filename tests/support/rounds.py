"""How often something is measured."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

_NEAR = 0.2


def rounds(found: Sequence[float]) -> Iterator[int]:
    """Three, and two more where what was found in these lies further apart than a fifth of its median.

    `found` is what the caller adds to, once a round.
    """
    yield from range(3)
    if max(found) - min(found) > _NEAR * statistics.median(found):
        yield from range(3, 5)
