"""The end of a gang: nothing new is taken, and what runs is given time. Plain Python, no Ray, no torch."""

from __future__ import annotations

from collections.abc import Callable

_SILENT_S = 5.0


class Drain:
    """Whether the gang is about to end, and what the ingress replicas still have open."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._until: float | None = None
        self._open: dict[str, tuple[int, float]] = {}

    def begin(self, grace_s: float) -> None:
        """Begin, or shorten the time that is left."""
        until = self._clock() + grace_s
        self._until = until if self._until is None else min(self._until, until)

    @property
    def begun(self) -> bool:
        """Whether nothing new is taken."""
        return self._until is not None

    def report(self, ingress_id: str, answers: int) -> float | None:
        """An ingress replica has so many open answers. Returns the seconds they may go on, None while all is well."""
        self._open[ingress_id] = (answers, self._clock())
        return None if self._until is None else max(self._until - self._clock(), 0.0)

    def open_answers(self) -> int:
        """Open answers of all ingress replicas; one that has not reported for long is gone."""
        now = self._clock()
        self._open = {name: (count, at) for name, (count, at) in self._open.items() if now - at <= _SILENT_S}
        return sum(count for count, _ in self._open.values())
