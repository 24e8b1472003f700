"""What one forward pass gets: the tokens of a step and where each sequence's memory lies.

Shapes: T tokens of the step, S decoding sequences, N pages of the longest table, R rows whose logits are wanted.
Rows of decoding sequences come first, those of prefill chunks after.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """The decoding sequences of a step; each goes through its replay ring."""

    starts_S1: Tensor
    """int32 [S + 1]: sequence s owns rows starts[s] to starts[s + 1]."""
    lengths_S: Tensor
    """int32 [S]: committed length, which is the position of the sequence's first row."""
    slots_S: Tensor
    """int32 [S]: state slot."""
    pages_SN: Tensor
    """int32 [S, N]: page tables, padded with 0."""


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """A run of prompt tokens of one sequence."""

    start: int
    """First row in the step."""
    end: int
    """One past the last row."""
    length: int
    """Tokens committed before the chunk."""
    slot: int
    """Slot holding the committed state; not read when ``length`` is 0."""
    spare: int
    """Slot that receives the state at the chunk's end; commit swaps it in."""
    pages_N: Tensor
    """int32 [N]: page table, covering ``length + end - start`` tokens."""


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One worker's part of a step."""

    token_ids_T: Tensor
    """int64 [T]."""
    positions_T: Tensor
    """int32 [T]: position of each token in its sequence."""
    kv_rows_T: Tensor
    """int32 [T]: flat row of the KV pool each token writes, ``page * page_size + offset``."""
    decode: DecodeRows | None
    prefill: tuple[PrefillChunk, ...]
    logit_rows_R: Tensor
    """int64 [R]: rows whose logits are wanted, ascending."""

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.token_ids_T.shape[0]

    @property
    def decode_rows(self) -> int:
        """Rows of decoding sequences; they come first."""
        return self.prefill[0].start if self.prefill else self.num_tokens
