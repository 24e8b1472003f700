"""Passes in two micro-batches, over any mode whose experts are on ranks of their own: each has ends of its own.

They share the process group, whose messages keep their order: of a layer the first micro-batch's rows are sent, and
answered, before the second's. So a shard computes one while the workers compute the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

from torch import Tensor

from divisi.cluster.dispatch.protocol import Experts, Peers, ShardedMode, ShardEnd, WorkerEnd
from divisi.cluster.passes import Pass
from divisi.model.dispatcher import Pending

_MOST = 2


@dataclass(frozen=True, slots=True)
class MicroBatches:
    """A mode that takes passes in one micro-batch and in two."""

    mode: ShardedMode

    def worker_end(self, peers: Peers) -> WorkerEnd:
        """See DispatchMode."""
        together = replace(peers, join=cache(peers.join))
        return _WorkerEnd(peers.seat, [self.mode.worker_end(together) for _ in range(_MOST)])

    def shard_end(self, peers: Peers, experts: Experts) -> ShardEnd:
        """See ShardedMode."""
        together = replace(peers, join=cache(peers.join))
        return _ShardEnd([self.mode.shard_end(together, experts) for _ in range(_MOST)])


class _WorkerEnd:
    """Implements WorkerEnd. Of a worker with rows in both micro-batches, `dispatch` gets those of each by turns."""

    def __init__(self, seat: int, ends: Sequence[WorkerEnd]) -> None:
        self._seat, self._ends = seat, ends
        self._walked = list(ends)
        """The ends of the pass under way to which this worker brings rows; the next one's turn is first."""

    def begin(self, step_pass: Pass) -> None:
        """See WorkerEnd."""
        parts = step_pass.micro_batches
        for end, part in zip(self._ends, parts, strict=False):
            end.begin(part)
        self._walked = [end for end, part in zip(self._ends, parts, strict=False) if part.rows(self._seat)]

    def dispatch(self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor, gates_TK: Tensor) -> Pending:
        """See `divisi.model.dispatcher.Dispatcher`. Raises StepAborted."""
        end = self._walked.pop(0)
        self._walked.append(end)
        return end.dispatch(layer, x_TD, expert_ids_TK, gates_TK)

    def idle(self, layer: int) -> None:
        """See WorkerEnd."""
        self._ends[0].idle(layer)

    def carried_all(self) -> bool:
        """See WorkerEnd."""
        told = [end.carried_all() for end in self._ends]  # each is to know that the step is over
        return all(told)


class _ShardEnd:
    """Implements ShardEnd."""

    def __init__(self, ends: Sequence[ShardEnd]) -> None:
        self._ends = ends
        self._walked = list(ends)

    def begin(self, step_pass: Pass) -> None:
        """See ShardEnd."""
        parts = step_pass.micro_batches
        self._walked = list(self._ends[: len(parts)])
        for end, part in zip(self._walked, parts, strict=True):
            end.begin(part)

    def serve(self, layer: int) -> None:
        """See ShardEnd."""
        for end in self._walked:
            end.serve(layer)
