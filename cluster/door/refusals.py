"""Refused connections in the log: one line of each kind in a while, with how many there were."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable

from divisi.cluster.door.errors import Kind

logger = logging.getLogger(__name__)

_EVERY_S = 10.0


class Refusals:
    """Of one door. Bounded, whatever arrives: there are few kinds."""

    def __init__(self, door: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._door = door
        self._clock = clock
        self._told_at: dict[Kind, float] = {}
        self._untold: Counter[Kind] = Counter()

    def note(self, kind: Kind, text: str) -> None:
        """One was refused; `text` names the peer and the reason."""
        now = self._clock()
        if now - self._told_at.get(kind, -_EVERY_S) < _EVERY_S:
            self._untold[kind] += 1
            return
        self._told_at[kind] = now
        more = self._untold.pop(kind, 0)
        also = f" ({more} more of this kind since the last such line)" if more else ""
        logger.warning("the door %s refused a connection: %s%s", self._door, text, also)
