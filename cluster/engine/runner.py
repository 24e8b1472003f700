"""What an engine steps: a model with its memory, and steps that nobody asked for.

Shapes: R rows of logits, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Protocol

from torch import Tensor

from divisi.cluster.engine.step.plan import StepPlan
from divisi.kernels.native.passes import AllDrafted
from divisi.kernels.sampling.layout import Draws
from divisi.model.batch import StepBatch
from divisi.model.dispatcher import Dispatcher
from divisi.model.mtp import Drafted
from divisi.model.state import Pairs


class Runner(Protocol):
    """The model and its memory: `model.runner.ModelRunner`, or a stand-in."""

    def forward(self, batch: StepBatch, dispatcher: Dispatcher) -> Tensor:
        """Run a full pass; return the fp32 logits [R, V] of `batch.logit_rows_R`, valid until the next call.

        Running the same batch again after an aborted run gives the same logits and leaves the same state.
        """
        ...

    def draw(self, batch: StepBatch, dispatcher: Dispatcher, draws: Draws) -> list[int] | None:
        """A full pass, and the token after each of its rows; None where tokens are to be drawn from logits."""
        ...

    def forward_in_turns(self, batches: Seq[StepBatch], dispatcher: Dispatcher) -> Tensor:
        """A full pass of micro-batches of decoding rows: while one is with the experts, the next one is computed here.

        The dispatcher gets a layer's rows micro-batch by micro-batch. Returns the logits of all, as `forward`.
        """
        ...

    def draft(self, batch: StepBatch, dispatcher: Dispatcher, hidden_SD: Tensor | None) -> Drafted:
        """Run a draft pass, of one row per sequence; `hidden_SD` comes from the pass before, None in the first."""
        ...

    def drafts_at_once(self, rows: int, dispatcher: Dispatcher) -> bool:
        """Whether draft passes of at most so many rows may be run by `draft_all`."""
        ...

    def draft_all(
        self, batch: StepBatch, counts: tuple[int, ...], dispatcher: Dispatcher, draws: Draws
    ) -> AllDrafted:
        """All draft passes of a step; `batch` is the first one's, of whose rows the first `counts` draft in each."""
        ...

    def prepare(self, flushes: Pairs, slot_copies: Pairs, page_copies: Pairs) -> None:
        """Carry out the `MemoryOps` of a step, before its first pass. Doing it again changes nothing."""
        ...


class Rehearsal(Protocol):
    """Steps that nobody asked for, before those of requests; as an engine's own, but without events."""

    def plan(self) -> StepPlan | None:
        """The next one; None when it is over."""
        ...

    def run_pass(self, plan: StepPlan, index: int, dispatcher: Dispatcher) -> None:
        """Run one of its passes. Raises StepAborted."""
        ...

    def commit(self, plan: StepPlan) -> None:
        """Its passes have run."""
        ...
