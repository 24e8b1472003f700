"""Passes of few decoding rows in one call each, where all experts are in this process.

A small model's layer takes longer to be asked for than to be computed; their results are to the bit the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from torch import Tensor

from divisi.kernels.native.fused import Fused
from divisi.kernels.native.passes import AllDrafted, FusedLayer, FusedPasses, PassRows
from divisi.kernels.sampling.layout import Draws
from divisi.model.batch import StepBatch
from divisi.model.config import ModelConfig
from divisi.model.experts import ExpertBank
from divisi.model.layers.block import Block
from divisi.model.layers.rotary import Rotary
from divisi.model.mtp import Drafted, MtpLayer
from divisi.model.stopwatch import Stopwatch
from divisi.model.weights import LayerWeights, MlpWeights, Weights

_MOST_KEPT = 4096
"""Batches."""


class WholePasses:
    """Of one model over one worker's memory and experts."""

    def __init__(self, most_rows: int, full: FusedPasses, drafts: FusedPasses | None) -> None:
        self._most_rows, self._full, self._drafts = most_rows, full, drafts
        self._rows: dict[int, tuple[StepBatch, PassRows]] = {}
        """Of batches, which come again with other numbers in the same memory."""

    @classmethod
    def of(
        cls, fused: Fused, config: ModelConfig, weights: Weights, rotary: Rotary, blocks: Sequence[Block],
        mtp: MtpLayer | None, bank: ExpertBank,
    ) -> Self | None:  # fmt: skip
        """Those of a model; None where some layer has a part that is not in them."""
        layers = [
            _layer(block, layer, bank, index)
            for index, (block, layer) in enumerate(zip(blocks, weights.layers, strict=True))
        ]
        found = [layer for layer in layers if layer is not None]
        if len(found) < len(layers) or (mtp is not None and mtp.fused is None):
            return None

        def passes(layers: list[FusedLayer], last_scale_D: Tensor) -> FusedPasses:
            drafts = None if mtp is None else mtp.fused
            return FusedPasses(
                fused.compiled, weights.embed_VD, rotary.cos_sin_PR, layers, bank.tree, last_scale_D, weights.head_VD,
                config.rms_norm_eps, drafts,
            )  # fmt: skip

        drafting = None
        if mtp is not None:
            layer = _layer(mtp.block, mtp.weights.layer, bank, config.mtp_index)
            if layer is None:
                return None
            drafting = passes([layer], mtp.weights.final_scale_D)
        return cls(fused.most_rows(weights.head_VD), passes(found, weights.final_scale_D), drafting)

    def takes_rows(self, count: int) -> bool:
        """Whether a pass of so many decoding rows is one call."""
        return count <= self._most_rows

    def takes(self, batch: StepBatch) -> bool:
        """Whether a pass of such rows is one call."""
        rows = batch.num_tokens
        return batch.prefill is None and rows <= self._most_rows and batch.logit_rows_R.shape[0] == rows

    def full(self, batch: StepBatch, stopwatch: Stopwatch) -> Tensor:
        """Return ``logits_RV`` of every row; what `MtpLayer.record` keeps is kept."""
        logits_RV = self._full.full(self._rows_of(batch))
        stopwatch.lap_of(self._full)
        return logits_RV

    def draw(self, batch: StepBatch, draws: Draws, stopwatch: Stopwatch) -> list[int]:
        """As `full`; return the token that is drawn after each row."""
        tokens = self._full.draw(self._rows_of(batch), draws)
        stopwatch.lap_of(self._full)
        return tokens

    def draft(self, batch: StepBatch, hidden_SD: Tensor | None, stopwatch: Stopwatch) -> Drafted:
        """See `MtpLayer.draft`."""
        assert self._drafts is not None, "the model drafts"
        drafted = Drafted(*self._drafts.draft(self._rows_of(batch), hidden_SD))
        stopwatch.lap_of(self._drafts)
        return drafted

    def draft_all(
        self, batch: StepBatch, counts: tuple[int, ...], draws: Draws, stopwatch: Stopwatch
    ) -> AllDrafted:
        """The draft passes of a step, each from what the one before it draws; `batch` is the first one's."""
        assert self._drafts is not None, "the model drafts"
        drafted = self._drafts.draft_all(self._rows_of(batch), counts, draws)
        stopwatch.lap_of(self._drafts)
        return drafted

    def _rows_of(self, batch: StepBatch) -> PassRows:
        """What was made of this very object before, or is now."""
        found = self._rows.get(id(batch))
        if found is None or found[0] is not batch:
            if len(self._rows) >= _MOST_KEPT:
                self._rows.clear()
            found = self._rows[id(batch)] = batch, _rows(batch)
        return found[1]


def _layer(block: Block, weights: LayerWeights, bank: ExpertBank, index: int) -> FusedLayer | None:
    if block.fused is None:
        return None
    mixer, router, mlp = block.fused.mixer, block.fused.norm_route, weights.mlp
    if isinstance(mlp, MlpWeights):
        return FusedLayer(mixer, None, weights.mlp_scale_D, (mlp.gate_up_FD, mlp.down_DI), None)
    assert mlp.shared_gate_up_FD is not None, "on a CPU the shared expert is apart"
    shared = mlp.shared_gate_up_FD, mlp.shared_down_DI
    return FusedLayer(mixer, router, weights.mlp_scale_D, shared, bank.layers[index])


def _rows(batch: StepBatch) -> PassRows:
    decode = batch.decode
    assert decode is not None, "rows that decode"
    return PassRows(
        batch.token_ids_T, batch.positions_T, batch.kv_rows_T, decode.starts_S1, decode.lengths_S, decode.slots_S,
        decode.pages_SN,
    )  # fmt: skip
