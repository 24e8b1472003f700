"""What a coordinator tells of its gang. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from divisi.cluster.seats import ScrapeTarget, StreamAddress

Stats = Mapping[str, float | Mapping[str, float]]
"""Of one rank, by name; some are by one or two more keys, written `chat 1`."""


@dataclass(frozen=True, slots=True)
class CoordinatorStatus:
    """What the gang looks like now. `stats` and `progress` are keyed by seat."""

    ready: bool
    reason: str
    epoch: int
    stats: Mapping[str, Stats] = field(default_factory=dict)
    progress: Mapping[str, str] = field(default_factory=dict)
    """Last word of each rank while it loads, for instance `expert:1` -> `120 MB read`."""
    failures: Mapping[str, str] = field(default_factory=dict)
    """Ranks that could not load, and why."""
    streams: tuple[StreamAddress, ...] = ()
    """Where the ingresses reach the attention workers."""
    gang: Stats = field(default_factory=dict)
    """Seats and epochs in numbers."""
    targets: tuple[ScrapeTarget, ...] = ()
    """Whose metrics can be scraped."""
    workers: int = 0
    """Attention workers of the epoch; 0 between epochs."""
    recovering: bool = False
    """The gang has had an epoch, and is to have another soon."""
    gathering: bool = False
    """The coordinator was started anew and does not know yet whether the gang serves."""
