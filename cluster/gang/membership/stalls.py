"""How long a gang stood still between two epochs, by why the first one ended: from the moment at which the coordinator
hears that a rank has left it to that at which all ranks of the next have reached each other. Plain data, no clock.

No step runs in between, whether or not anybody waited for one. What passes before an end is heard of, as the silence of
a rank that hangs, is not in it. Imports no torch.
"""

from __future__ import annotations

from typing import Literal

from divisi.cluster.gang.membership.status import Stats

Cause = Literal["scaled", "moved", "changed", "broken"]
"""Another number of expert shards; a virtual shard elsewhere for the sake of balance; somebody came or went, or took up
its share again; a rank was lost, or a step could not finish."""
CAUSES: tuple[Cause, ...] = ("scaled", "moved", "changed", "broken")


class Stalls:
    """Of one gang, since its coordinator began."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = dict.fromkeys(CAUSES, 0.0)
        self._counts: dict[str, float] = dict.fromkeys(CAUSES, 0.0)
        self._has_served = False
        self._since: float | None = None
        self._orderly = True

    def look(self, serves: bool, orderly: bool, change: Literal["scaled", "moved", ""], now: float) -> None:
        """`orderly`: the last epoch has ended between two steps, and the next is to serve at once; `change`: of the
        layout, by the epoch that has begun since."""
        if serves:
            if self._since is not None:
                cause: Cause = (change or "changed") if self._orderly else "broken"
                self._seconds[cause] += now - self._since
                self._counts[cause] += 1
            self._has_served, self._since = True, None
        elif self._has_served:
            if self._since is None:
                self._since, self._orderly = now, True
            self._orderly = self._orderly and orderly

    def numbers(self) -> Stats:
        """For metrics."""
        return {"stall_seconds": dict(self._seconds), "stalls": dict(self._counts)}
