"""Which requests a gang's ranks may be dying of: plans that abort again and again are taken apart. Plain data.

A step that loses a rank inside a layer is replayed, since ranks die for many reasons. After two aborts in a row of the
same plan its requests are suspects, in groups that are tried one after another, each in a step of its own: those that
have committed a step before together, each newcomer by itself. A group that commits is cleared; one that aborts is
halved, down to a single request, which ends after failing alone twice.
"""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Sequence as Seq

from divisi.cluster.engine.sequence import Sequence

_IN_A_ROW = 2
"""Aborts of one plan, and failures of a single request alone."""


class Suspects:
    """Of one attention worker. A group is a list of sequences in their order of arrival."""

    def __init__(self) -> None:
        self._groups: list[list[Sequence]] = []
        """To be tried, the next one last."""
        self._strikes = 0
        """In a row, of the plan under way where nobody is a suspect, else of the single request that is tried."""

    def group(self, running: Collection[Sequence]) -> list[Sequence] | None:
        """Whom the next plan is to have, of those that run; None: everybody. Who runs no more is no suspect."""
        while self._groups:
            self._groups[-1] = [sequence for sequence in self._groups[-1] if sequence in running]
            if self._groups[-1]:
                return self._groups[-1]
            self.clear()
        return None

    def clear(self) -> None:
        """The plan under way has committed, or its group could not be tried."""
        self._strikes = 0
        if self._groups:
            self._groups.pop()

    def strike(self, planned: Seq[Sequence]) -> tuple[bool, Sequence | None]:
        """A step with this plan has lost a rank inside a layer.

        Returns whether to plan anew, and the request that is to end for it, if any.
        """
        self._strikes += 1
        if self._groups and len(self._groups[-1]) > 1:
            self._halve()
            return True, None
        if self._strikes < _IN_A_ROW:
            return False, None
        if self._groups:
            (failed,) = self._groups[-1]
            self.clear()
            return True, failed
        newcomers = [sequence for sequence in planned if not (sequence.length or sequence.num_generated)]
        others = [sequence for sequence in planned if sequence not in newcomers]
        self._groups = [[newcomer] for newcomer in reversed(newcomers)] + ([others] if others else [])
        self._strikes = 0
        return True, None

    def _halve(self) -> None:
        group = self._groups.pop()
        middle = len(group) // 2
        self._groups += [group[middle:], group[:middle]]
        self._strikes = 0
