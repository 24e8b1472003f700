"""What the ingresses refuse for want of room, which no worker sees by itself. Plain Python, no Ray, no torch."""

from __future__ import annotations

from collections.abc import Callable

_SILENT_S = 2.0
"""An ingress says it twice a second while anything is open."""


class RefusedDemand:
    """Tokens that requests would bring whose clients were told to come again, by ingress replica."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._tokens: dict[str, tuple[int, float]] = {}

    def report(self, ingress_id: str, tokens: int) -> None:
        """So many are waiting for room in an ingress replica now."""
        self._tokens[ingress_id] = (tokens, self._clock())

    def tokens(self) -> int:
        """Of all ingress replicas; what one has not repeated for long does not count."""
        now = self._clock()
        self._tokens = {name: told for name, told in self._tokens.items() if now - told[1] <= _SILENT_S}
        return sum(tokens for tokens, _ in self._tokens.values())
