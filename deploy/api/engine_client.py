"""What the HTTP API needs of the gang: token events for a request, and whether it can serve now."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Protocol

from divisi.cluster.gang.membership.layout.scaling import ScaleStatus
from divisi.cluster.request import Request, TokenEvent
from divisi.cluster.seats import ScrapeTarget
from divisi.cluster.telemetry.rows import StatRow


@dataclass(frozen=True, slots=True)
class GangStatus:
    """Whether the gang can serve now, why not, and its numbers."""

    ready: bool
    reason: str
    """Why it isn't ready, for people: `"loading weights, 3 of 4 seats filled"`. Anything when it is."""
    stats: tuple[StatRow, ...] = ()
    targets: tuple[ScrapeTarget, ...] = ()
    """The processes whose metrics can be scraped."""


class EngineClient(Protocol):
    """The gang as one HTTP process sees it."""

    def generate(self, request: Request) -> AsyncGenerator[Sequence[TokenEvent], None]:
        """Token events of one request, the last of them terminal; together what came while nobody was asking.

        Closing the iterator, or cancelling a task that waits in it, cancels the request.
        Raises `Overloaded`, `GangNotReady` or `RequestRejected` before the first event.
        """
        ...

    async def check_ready(self) -> None:
        """Raises `GangNotReady` while the gang cannot serve; takes as long as it takes to find out."""
        ...

    async def status(self) -> GangStatus:
        """Answers at once, also while nothing is loaded."""
        ...


class GangAdmin(Protocol):
    """The gang as those who run it see it. Both raise `GangNotReady` where nobody can be asked."""

    async def scale(self, expert_shards: int) -> ScaleStatus:
        """Have so many expert shards; answers at once. Raises ValueError, for people, where there cannot be so many."""
        ...

    async def scale_status(self) -> ScaleStatus:
        """How that goes."""
        ...
