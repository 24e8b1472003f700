"""What one forward pass gets: the tokens of a step and where each sequence's memory lies.

A run is the rows that one sequence has in the step, at positions that follow each other. A decoding run goes through
the replay ring of its slot, a prefilling one scans its rows. Decoding rows come first, prefilling rows after.
Shapes: T tokens of the step, S runs, N pages of the longest table, R rows whose logits are wanted.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from divisi.kernels.gated_delta.layout import Leaves


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """The decoding sequences of a step; each goes through its replay ring.

    Where they are laid out for a bucket, sequences that are nobody's come last, and so do rows: of such a sequence the
    slot is -1 and it has no rows, such a row writes to no page (its KV row is -1) and chooses no expert.
    """

    starts_S1: Tensor
    """int32 [S + 1]: sequence s owns rows starts[s] to starts[s + 1]."""
    lengths_S: Tensor
    """int32 [S]: committed length, which is the position of the sequence's first row."""
    slots_S: Tensor
    """int32 [S]: state slot."""
    pages_SN: Tensor
    """int32 [S, N]: page tables, padded with 0."""
    slots_T: Tensor | None = None
    """int32 [T]: the slot of each row's sequence, where they are laid out for a bucket."""


@dataclass(frozen=True, slots=True)
class PrefillRows:
    """The prefilling runs of a step; each scans its rows from a state that it only reads."""

    starts_S1: Tensor
    """int32 [S + 1]: run s owns rows starts[s] to starts[s + 1], counted from the first prefilling row."""
    lengths_S: Tensor
    """int32 [S]: position of the run's first row."""
    sources_S: Tensor
    """int32 [S]: state slot that stands at that position; -1 at position 0, where the state is zero."""
    leaves: Leaves
    """What states the runs leave."""
    pages_SN: Tensor
    """int32 [S, N]: page tables, padded with 0."""


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
    prefill: PrefillRows | None
    decode_rows: int
    """Rows of decoding sequences; they come first."""
    logit_rows_R: Tensor
    """int64 [R]: rows whose logits are wanted, ascending."""

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.token_ids_T.shape[0]

    @property
    def padded_starts_S1(self) -> Tensor | None:
        """Where the rows of a step that is laid out for a bucket begin and end; None for others."""
        return None if self.decode is None or self.decode.slots_T is None else self.decode.starts_S1

    def cut(self, sequence: int, row: int) -> tuple[StepBatch, StepBatch]:
        """A batch of decoding rows in two, of which the second begins with that sequence and row."""
        assert self.decode is not None, "only decoding rows are cut"
        assert self.decode.slots_T is None, "a step that is laid out for a bucket stays whole"
        first = self._part(self.decode, slice(0, sequence), slice(0, row))
        return first, self._part(self.decode, slice(sequence, len(self.decode.slots_S)), slice(row, self.num_tokens))

    def _part(self, decode: DecodeRows, sequences: slice, rows: slice) -> StepBatch:
        starts_S1 = decode.starts_S1[sequences.start : sequences.stop + 1] - rows.start
        return StepBatch(
            token_ids_T=self.token_ids_T[rows],
            positions_T=self.positions_T[rows],
            kv_rows_T=self.kv_rows_T[rows],
            decode=DecodeRows(
                starts_S1, decode.lengths_S[sequences], decode.slots_S[sequences], decode.pages_SN[sequences]
            ),
            prefill=None,
            decode_rows=rows.stop - rows.start,
            logit_rows_R=self.logit_rows_R[: rows.stop - rows.start],
        )
