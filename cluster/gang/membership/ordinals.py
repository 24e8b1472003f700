"""Small numbers for processes that have no seat, so that their metrics keep a name. Plain data. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

LEASE_S = 15.0
"""A process that has not been heard of for so long is gone."""


@dataclass(slots=True)
class _Known:
    ordinal: int
    host: str
    port: int
    until: float


class Ordinals:
    """Gives each process the lowest number that is free, or the one that it had before."""

    def __init__(self) -> None:
        self._known: dict[str, _Known] = {}

    def renew(self, name: str, host: str, port: int, now: float, former: int | None = None) -> int:
        """A process is there; returns its number. `former` is what it had from another coordinator, if any."""
        self._forget(now)
        if (known := self._known.get(name)) is None:
            taken = {other.ordinal for other in self._known.values()}
            free = next(number for number in range(len(taken) + 1) if number not in taken)
            ordinal = free if former is None or former in taken else former
            known = self._known[name] = _Known(ordinal, host, port, now)
        known.host, known.port, known.until = host, port, now + LEASE_S
        return known.ordinal

    def all(self, now: float) -> list[tuple[int, str, int]]:
        """Number, host and port of those that are there, ascending."""
        self._forget(now)
        return sorted((known.ordinal, known.host, known.port) for known in self._known.values())

    def _forget(self, now: float) -> None:
        self._known = {name: known for name, known in self._known.items() if known.until > now}
