"""Which expert seat a process without one is to fill: its own, or that of one that died beside it.

Any shard's process can serve any share of the experts, since it loads them only when it knows which. So one that waits
with everything else loaded (a spare) takes the seat of one that dies, and that one, started anew, is the next spare.
Where a machine's spare has fallen silent too, the machine is lost, and a spare of another one takes the seat.
Plain data, no clock. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

_ELSEWHERE_S = 5.0
"""Longer than a process takes to start: a seat that is free for so long has lost its machine."""
_ROOM_S = 60.0
"""A seat that is new waits so long for a process that is started for it; then it is anybody's."""
_SILENT_S = 0.3
"""Who waits asks again before, once the time that it wanted to wait is over."""
_CONFIRM_S = 0.5
"""Within it, who was promised a seat asks for it again: it may have died while it waited."""
_PROMISE_S = 15.0
"""Who loads asks again meanwhile."""


@dataclass(frozen=True, slots=True)
class Applicant:
    """A process that could serve any share of the experts."""

    process: str
    """Its name, which the process that is started in its place has too."""
    host: str
    own: int | None = None
    """The share that it was created for; None: it is a spare."""
    returned: bool = False
    """It has had a seat, which another process took: nobody's that has its name is its own any more."""
    age_s: float = 0.0
    """Since the process began."""


@dataclass(frozen=True, slots=True)
class Share:
    """What a process is to load first, and for which seat."""

    index: int
    leaves: frozenset[int]
    """Virtual shards."""


@dataclass(slots=True)
class Vacancies:
    """Seats that nobody fills, and to whom they are promised. All times are in seconds of one clock."""

    seats: range
    """Of the shards that are processes of their own."""
    since: float
    """When all of them were free."""
    _freed: dict[int, tuple[str, float]] = field(default_factory=dict)
    """Where the last holder of a seat was, and until when."""
    _promised: dict[int, tuple[str, float]] = field(default_factory=dict)
    """To which process, and until when: it is loading."""
    _waiting: dict[str, tuple[str, float]] = field(default_factory=dict)
    """Where each spare waits, and until when it is heard of at the latest, unless it is lost."""

    def resize(self, seats: int, now: float) -> None:
        """There are so many seats; for a new one Ray is to find room, which takes as long as it takes."""
        for index in range(len(self.seats), seats):
            self._freed.setdefault(index, ("", now + _ROOM_S - _ELSEWHERE_S))
        self.seats = range(seats)

    def freed(self, index: int, host: str, now: float) -> None:
        """The holder of a seat is gone; it was on that host."""
        self._freed[index] = host, now
        self._promised.pop(index, None)

    def waits(self, applicant: Applicant, until: float) -> None:
        """An applicant has asked, and is to be heard of again once its question has stood for so long."""
        self._waiting[applicant.process] = applicant.host, until + _SILENT_S

    def find(self, applicant: Applicant, held: Mapping[int, str], now: float) -> int | None:
        """The seat that an applicant is to load for, or None. `held`: the process in each seat that has a holder.

        It is promised for a moment, and for longer to who asks again. A process is given its predecessor's seat, though
        that one may still serve: it lost its raylet, and who comes in its place takes over once it has loaded. A seat
        goes to no machine other than that of its last holder as long as that one may have a process in its place: two
        ranks would share the cores of one from then on.
        """
        process = applicant.process
        for index, holder in held.items():
            if holder == process and not applicant.returned:
                self._waiting.pop(process, None)
                return index
        free = [index for index in self.seats if index not in held and not self._is_promised(index, process, now)]
        able = [index for index in free if self._may_take(applicant, index, now)]
        if not able:
            return None
        found = min(able, key=lambda index: (not self._is_asked_for_again(index, process), index != applicant.own))
        if self._is_asked_for_again(found, process):
            self._promised[found] = process, now + _PROMISE_S
            self._waiting.pop(process, None)
        else:
            self._promised[found] = process, now + _CONFIRM_S
        return found

    def _is_asked_for_again(self, index: int, process: str) -> bool:
        return index in self._promised and self._promised[index][0] == process

    def _is_promised(self, index: int, process: str, now: float) -> bool:
        """To somebody else."""
        other, until = self._promised.get(index, (process, 0.0))
        return other != process and until > now

    def _may_take(self, applicant: Applicant, index: int, now: float) -> bool:
        host, since = self._freed.get(index, ("", self.since))
        near = applicant.own == index or host == applicant.host
        return near or now - since > _ELSEWHERE_S or self._is_silent(host, now)

    def _is_silent(self, host: str, now: float) -> bool:
        """Whether spares of a machine have waited, and none is heard of any more."""
        waiting = [until for where, until in self._waiting.values() if where == host]
        return bool(waiting) and max(waiting) < now
