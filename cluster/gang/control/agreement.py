"""How the leader decides that a step begins: plain data, no sockets. Imports no torch.

A worker announces what it brings to the passes of its next step, nothing when it has nothing to do. Once it took part
in a step the leader waits for its next announcement, which says at the same time that it has finished; a worker that
announced nothing is not waited for, and announces again when a request arrives.

A worker whose plan is suspected wants a step for itself: those who do take turns with the steps of all others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

from divisi.cluster.passes import Pass, PassKind

NOTHING: tuple[int, ...] = ()
_OTHERS = -1
"""All who do not want to be alone, where parties take turns."""


class StepAgreement:
    """Collects the announcements of the workers, who go by the indices of their seats, for the next step."""

    def __init__(self, workers: Iterable[int]) -> None:
        self._announced: dict[int, tuple[int, ...] | None] = dict.fromkeys(workers)
        self._second: dict[int, int] = {}
        """Rows of second micro-batches, of those that have any."""
        self._alone: set[int] = set()
        """Who wants a step for itself."""
        self._turns: list[int] = []
        """The parties that have had one, a worker or `_OTHERS`, the latest last."""

    def announce(self, worker: int, counts: tuple[int, ...], alone: bool = False, second: int = 0) -> None:
        """Note a worker's rows by pass, whether they are to have a step for themselves, and how many of the last pass's
        make up a second micro-batch.

        A later announcement for the same step replaces it.
        """
        self._announced[worker] = counts if any(counts) else NOTHING
        self._second[worker] = second
        if alone:
            self._alone.add(worker)
        else:
            self._alone.discard(worker)

    @property
    def unfinished(self) -> tuple[int, ...]:
        """Workers that take part in the running step and haven't announced their next."""
        return tuple(worker for worker, counts in self._announced.items() if counts is None)

    def begin(self) -> tuple[Pass, ...] | None:
        """The passes of a step that may begin now, else None. Those who bring rows have to announce anew."""
        if None in self._announced.values():
            return None
        agreed = {worker: counts for worker, counts in self._announced.items() if counts}
        if not agreed:
            return None
        if self._alone:
            agreed = self._whose_turn(agreed)
        self._announced.update(dict.fromkeys(agreed))
        return merge(agreed, {worker: rows for worker in agreed if (rows := self._second[worker])})

    def _whose_turn(self, agreed: Mapping[int, tuple[int, ...]]) -> dict[int, tuple[int, ...]]:
        """The rows of one who wants to be alone, or of all others: of those whose last turn is longest ago."""
        parties = {worker: {worker: counts} for worker, counts in agreed.items() if worker in self._alone}
        if others := {worker: counts for worker, counts in agreed.items() if worker not in self._alone}:
            parties[_OTHERS] = others
        turn = min(parties, key=lambda party: self._turns.index(party) if party in self._turns else -1)
        self._turns = [party for party in self._turns if party != turn] + [turn]
        return parties[turn]


def merge(announced: Mapping[int, Sequence[int]], second: Mapping[int, int] = MappingProxyType({})) -> tuple[Pass, ...]:
    """The passes of a step from what each worker brings: draft passes side by side from the first, one full pass last.

    (2, 1, 5) and (3,) are merged to (2, 0) (1, 0) (5, 3). `second`: of the full one, the rows of second micro-batches.
    """
    drafts = max(map(len, announced.values())) - 1
    passes: list[dict[int, int]] = [{} for _ in range(drafts + 1)]
    for worker, counts in announced.items():
        for index, rows in enumerate(counts):
            if rows:
                passes[index if index < len(counts) - 1 else drafts][worker] = rows
    full = passes.pop()
    return (*[Pass(PassKind.DRAFT, counts) for counts in passes], Pass(PassKind.FULL, full, second))


def own_index(step_pass: Pass, index: int, counts: Sequence[int]) -> int:
    """Which of a worker's own passes is the one at `index` of a merged step to which it brings rows."""
    return len(counts) - 1 if step_pass.kind is PassKind.FULL else index
