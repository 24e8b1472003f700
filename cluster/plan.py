"""What passes between the scheduler and the engine: a step's plan, and what became of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from divisi.cluster.request import FinishReason
from divisi.cluster.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens `start:end` of a sequence that prefills. The last chunk's logits choose the next token if it `samples`."""

    sequence: Sequence
    start: int
    end: int
    last: bool
    samples: bool

    def logit_positions(self) -> list[int]:
        """The positions whose logits are needed, ascending: for prompt log-probabilities, then for the next token."""
        prompt = self.sequence.prompt_positions(self.start, self.end)
        return [*prompt, self.end - 1] if self.samples else [*prompt]


class PageGrowth(NamedTuple):
    """Pages that a sequence got: entries `start` onwards of row `row` of the page table."""

    row: int
    start: int
    pages: list[int]


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one step computes. Its sequences do not change until it is committed.

    Tokens are chosen for each of `decodes`, then for each of `chunks` that samples, in this order.
    """

    decodes: tuple[Sequence, ...]
    chunks: tuple[Chunk, ...]
    growths: tuple[PageGrowth, ...]
    num_tokens: int


class Outcome(NamedTuple):
    """What a step, or a cancellation, did to a sequence."""

    sequence: Sequence
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    stop_id: int | None = None
