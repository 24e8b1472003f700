"""The multi-token prediction layer: drafts from the model's last outputs, and its memory of committed tokens.

The entry of position j, at its row of the KV pool, comes from h of position j - 1 and the embedding of token j, so that
a page depends on its own prefix only; position 0 has none. An entry is `fc` and the key and value projection: no
attention, no experts. Every step writes those of all its rows from the true h, whatever was drafted before; what drafts
wrote past the committed length is scratch.

Shapes: T rows, D model width, S sequences, N entries of hidden states in a slot, E those of all slots, L states that
are left, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from divisi.kernels.native.fused import DraftLayer
from divisi.kernels.select import Kernels
from divisi.model.batch import DecodeRows, PrefillRows, StepBatch
from divisi.model.config import ModelConfig
from divisi.model.dispatcher import Dispatcher
from divisi.model.layers.block import Block
from divisi.model.layers.head import logits
from divisi.model.layers.mixer import biased
from divisi.model.state import StateStore
from divisi.model.stopwatch import Stopwatch
from divisi.model.weights import AttentionWeights, MtpWeights, Weights

_FIRST = 1
"""The first position that has an entry."""


class Drafted(NamedTuple):
    """What one pass over the MTP layer gives, row by row."""

    logits_SV: Tensor
    """fp32: of the token after the row's."""
    hidden_SD: Tensor
    """What the next pass goes on from, in place of the model's h."""


class MtpLayer:
    """The layer's weights over one worker's memory."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        layer: MtpWeights,
        store: StateStore,
        kernels: Kernels,
        dtype: torch.dtype,
    ) -> None:
        """`dtype` is that of activations."""
        self._dtype = dtype
        self._config, self._weights, self.weights = config, weights, layer
        self._store, self._kernels = store, kernels
        mixer = layer.layer.mixer
        assert isinstance(mixer, AttentionWeights), "the MTP layer is one of full attention"
        self._norm, self._pool = mixer.norm, store.kv[config.mtp_index]
        self.block = Block(config, kernels, layer.layer, config.mtp_index, store, _FIRST)
        hidden_SND = store.hidden_SND
        self._entries = hidden_SND.shape[1]
        self._hidden_ED = hidden_SND.view(-1, hidden_SND.shape[-1])
        """All entries of all slots."""
        self.fused: DraftLayer | None = None
        """What begins its passes and keeps what steps leave, for steps of few rows."""
        self._most_rows = 0
        if kernels.fused is not None and layer.kv_rows_bias_P is None:
            self._most_rows = kernels.fused.most_rows(layer.fc_DE)
            self.fused = kernels.fused.drafts(
                weights.embed_VD, layer.embedding_scale_D, layer.hidden_scale_D, layer.fc_DE, layer.layer.input_scale_D,
                layer.kv_rows_PD, mixer.norm, self._pool, hidden_SND, config.rms_norm_eps, config.rotary_dim // 2,
            )  # fmt: skip

    def record(self, h_TD: Tensor, batch: StepBatch, cos_sin_TR: Tensor) -> None:
        """Write what a step's rows leave: their entries, and h (the model's final-norm outputs) to the slots."""
        decode = batch.decode
        if self.fused is not None and decode is not None and self._takes(batch):
            self.fused.record(
                batch.token_ids_T, h_TD, cos_sin_TR, batch.kv_rows_T, decode.starts_S1, decode.lengths_S, decode.slots_S
            )
            return
        before_TD = self._keep(h_TD, batch)
        x_TD = self._input(batch.token_ids_T, before_TD)
        normed_TD = self._kernels.rms_norm(x_TD, self.weights.layer.input_scale_D, self._config.rms_norm_eps)
        kv_TP = biased(self._kernels.linear(normed_TD, self.weights.kv_rows_PD), self.weights.kv_rows_bias_P)
        self._kernels.attention_inputs(kv_TP, cos_sin_TR, self._norm, self._pool, batch.kv_rows_T, 0)

    def draft(
        self,
        batch: StepBatch,
        cos_sin_TR: Tensor,
        hidden_SD: Tensor | None,
        dispatcher: Dispatcher,
        stopwatch: Stopwatch,
    ) -> Drafted:
        """One pass over decoding sequences of one row each; `hidden_SD` is that of the pass before, None in the first.

        Raises what the dispatcher raises when the step cannot be finished.
        """
        assert batch.decode is not None, "decoding sequences draft"
        kernels, eps = self._kernels, self._config.rms_norm_eps
        residual_TD = self._begun(batch, batch.decode, hidden_SD)
        mixed_TD = self.block.mix(residual_TD, None, cos_sin_TR, batch)
        stopwatch.lap("draft")
        update = self.block.feed(residual_TD, mixed_TD, batch, dispatcher, stopwatch)()
        out_TD = kernels.mixture.add_norm(residual_TD, update, self.weights.final_scale_D, eps)
        logits_SV = logits(kernels, out_TD, self._weights.head_VD)
        stopwatch.lap("draft")
        return Drafted(logits_SV, out_TD)

    def _begun(self, batch: StepBatch, decode: DecodeRows, hidden_SD: Tensor | None) -> Tensor:
        """What goes into the layer."""
        if self.fused is not None and self._takes(batch):
            return self.fused.input(batch.token_ids_T, hidden_SD, decode.starts_S1, decode.lengths_S, decode.slots_S)
        if hidden_SD is None:
            hidden_SD = self._hidden_ED.index_select(0, self._entry(decode.slots_S, decode.lengths_S - 1))
            hidden_SD = hidden_SD.to(self._dtype)
        return self._input(batch.token_ids_T, hidden_SD)

    def _takes(self, batch: StepBatch) -> bool:
        return batch.prefill is None and batch.num_tokens <= self._most_rows

    def _input(self, token_ids_T: Tensor, h_TD: Tensor) -> Tensor:
        """``fc`` of each row's embedding and the h before it."""
        eps = self._config.rms_norm_eps
        embedded_TD = self._kernels.embed(self._weights.embed_VD, token_ids_T).to(self._dtype)
        parts = (
            self._kernels.rms_norm(embedded_TD, self.weights.embedding_scale_D, eps),
            self._kernels.rms_norm(h_TD, self.weights.hidden_scale_D, eps),
        )
        return self._kernels.linear(torch.cat(parts, dim=-1), self.weights.fc_DE)

    def _entry(self, slots_T: Tensor, positions_T: Tensor) -> Tensor:
        """Where the slots keep h of the positions, int32. That of a position before the first is another's: unread."""
        return (positions_T % self._entries).add_(self._first_entry(slots_T))

    def _first_entry(self, slots_T: Tensor) -> Tensor:
        """Slot -1 is nobody's, as the last one is."""
        return (slots_T * self._entries).remainder_(self._hidden_ED.shape[0])

    def _keep(self, h_TD: Tensor, batch: StepBatch) -> Tensor:
        """Have the slots keep h of a step's rows; returns the h before each row.

        A ring run's rows go to its slot, which has room for them and the one before; a scan run's state takes the row
        along that it ends with.
        """
        parts = []
        if batch.decode is not None:
            rows = batch.decode_rows
            parts.append(self._keep_rings(h_TD[:rows], batch.decode, batch.positions_T[:rows]))
        if batch.prefill is not None:
            parts.append(self._keep_scans(h_TD[batch.decode_rows :], batch.prefill))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _keep_rings(self, h_TD: Tensor, decode: DecodeRows, positions_T: Tensor) -> Tensor:
        slots_T, rows = decode.slots_S if decode.slots_T is None else decode.slots_T, positions_T.shape[0]
        if slots_T.shape[0] < rows:
            slots_T = torch.repeat_interleave(slots_T, decode.starts_S1.diff(), output_size=rows)
        bases_T = self._first_entry(slots_T)
        entries_T = (positions_T % self._entries).add_(bases_T)
        self._hidden_ED.index_copy_(0, entries_T.long(), h_TD.float())
        before_T = (positions_T - 1).remainder_(self._entries).add_(bases_T)
        return self._hidden_ED.index_select(0, before_T).to(self._dtype)

    def _keep_scans(self, h_TD: Tensor, prefill: PrefillRows) -> Tensor:
        before_TD = torch.empty_like(h_TD)
        before_TD[1:] = h_TD[:-1]
        firsts_S = prefill.starts_S1[:-1].long()
        kept_SD = self._hidden_ED.index_select(0, self._entry(prefill.sources_S.clamp(min=0), prefill.lengths_S - 1))
        before_TD[firsts_S] = torch.where(prefill.lengths_S[:, None] > 0, kept_SD, 0.0).to(self._dtype)
        leaves = prefill.leaves
        last_L = leaves.positions_L - 1
        offsets_S = prefill.starts_S1[:-1] - prefill.lengths_S
        of_leaf_L = torch.repeat_interleave(offsets_S, leaves.starts_S1.diff(), output_size=last_L.shape[0])
        entries_L = self._entry(leaves.slots_L, last_L).long()
        self._hidden_ED.index_copy_(0, entries_L, h_TD.index_select(0, of_leaf_L + last_L).float())
        return before_TD
