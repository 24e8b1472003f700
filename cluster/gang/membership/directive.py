"""What a holder of a seat is told to do. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from divisi.cluster.seats import Membership


@dataclass(frozen=True, slots=True)
class Directive:
    """What a holder shall do next. `membership` comes with `enter`, `epoch` with `leave` and `change`, `leaves` and
    `order` with `prepare`.

    `change` is for the leader: end the epoch between two steps. `prepare` is for a shard, and changes nothing that it
    serves: hold these virtual shards and no others.
    """

    action: Literal["stay", "enter", "leave", "change", "prepare", "rejoin"]
    membership: Membership | None = None
    epoch: int = 0
    refused_tokens: int = 0
    """Beside it: what the whole gang has no room for now."""
    leaves: frozenset[int] = frozenset()
    order: int = 0
    """By which a report says what it is about: no other has the number."""
