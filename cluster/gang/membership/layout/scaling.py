"""How a change of the number of expert shards goes: what it waits for, and how long each part of it took. Plain data.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from divisi.cluster.gang.membership.vacancies import Applicant

PARTS = ("decision", "process", "imports", "load", "epoch")
"""Until who starts processes knows; until the last new one has begun; until it has imported what it needs; until every
seat has loaded its share; until all serve in an epoch of so many shards."""


@dataclass(frozen=True, slots=True)
class ScaleStatus:
    """Of the last change, or of the shards that there were from the beginning."""

    expert_shards: int
    """As many serve, or are to as soon as an epoch forms."""
    wanted: int
    waits_for: tuple[str, ...] = ()
    """What is still to happen, for people; empty once it is done."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """By the name of the part, of those that have ended."""
    bytes_read: int = 0
    """Of weights, since the change was asked for."""
    processes: frozenset[str] = frozenset()
    """Names of those that hold expert seats."""
    why: str = ""
    """It was asked for, for people; empty while nobody has."""


@dataclass(slots=True)
class Scaling:
    """Notes when what has happened. All times are in seconds of one clock."""

    why: str = ""
    _begun: float | None = None
    _known: int = 0
    """Of so many shards there are processes already."""
    _at: dict[str, float] = field(default_factory=dict)
    """When each part ended."""
    _asked: set[str] = field(default_factory=set)
    _read: Mapping[str, float] = field(default_factory=dict)

    def begin(self, shards: int, read: Mapping[str, float], why: str, now: float) -> None:
        """A change is asked for. `shards`: as many there are; `read`: bytes of weights that each holder has read."""
        self._begun, self._known, self._read, self.why = now, shards, dict(read), why
        self._at, self._asked = {}, set()

    def told(self, now: float) -> None:
        """Who starts processes knows."""
        if self._begun is not None:
            self._at.setdefault("decision", now)

    def asked(self, applicant: Applicant, now: float) -> None:
        """A process is wanted; how it began is in its first question."""
        new = (applicant.own or 0) >= self._known and applicant.process not in self._asked
        if self._begun is not None and "load" not in self._at and new:
            self._asked.add(applicant.process)
            self._at["process"] = max(now - applicant.age_s, self._at.get("decision", self._begun))
            self._at["imports"] = now

    def look(self, lacking: Sequence[str] | None, serves: bool, now: float) -> None:
        """`lacking`: what is still to be loaded, None once the change has taken effect; `serves`: the gang does."""
        if self._begun is not None:
            if not lacking:
                self._at.setdefault("load", now)
            if lacking is None and serves:
                self._at.setdefault("epoch", now)

    def seconds(self) -> dict[str, float]:
        """How long each part took, of those that have ended."""
        since, found = self._begun or 0.0, {}
        for part in PARTS:
            if part in self._at:
                found[part], since = max(self._at[part] - since, 0.0), max(self._at[part], since)
        return found

    @property
    def is_over(self) -> bool:
        """Whether all of it has happened."""
        return self._begun is None or "epoch" in self._at

    def bytes_read(self, read: Mapping[str, float]) -> int:
        """Since the change was asked for; `read`: by each holder, as in `begin`."""
        return 0 if self._begun is None else int(sum(n - self._read.get(who, 0.0) for who, n in read.items()))
