"""A decoder layer's fused operations, for steps of few rows that all decode.

These take longer to be told to the kernels than to be computed, so what is around the mixer and around the router is
one operation each, made once for the layer. The results are to the bit those of the operations one by one.
Shapes: T rows, D model width, R rotary dim.
"""

from __future__ import annotations

from typing import Self, cast

from torch import Tensor

from divisi.kernels.attention.layout import KvPool
from divisi.kernels.gated_delta.layout import DeltaState
from divisi.kernels.mixture.layout import MixtureRows
from divisi.kernels.native.fused import Attention, DeltaNet, Fused, NormRoute
from divisi.model.batch import StepBatch
from divisi.model.config import ModelConfig
from divisi.model.weights import AttentionWeights, LayerWeights, MlpWeights

Mixer = Attention | DeltaNet


class FusedBlock:
    """Of one layer."""

    def __init__(self, most_rows: int, attends: bool, mixer: Mixer, norm_route: NormRoute | None) -> None:
        self.most_rows, self.mixer, self.norm_route = most_rows, mixer, norm_route
        self._attends = attends

    @classmethod
    def of(
        cls, fused: Fused, config: ModelConfig, weights: LayerWeights, pool: KvPool | None, delta: DeltaState | None,
        first: int,
    ) -> Self | None:  # fmt: skip
        """Those of a layer; None where it has a part that is not in them."""
        mixer = weights.mixer
        if isinstance(mixer, AttentionWeights) and mixer.rows_bias_P is not None:
            return None
        made = _mixer(fused, config, weights, pool, delta, first)
        attends = isinstance(mixer, AttentionWeights)
        return cls(fused.most_rows(mixer.rows_PD), attends, made, _norm_route(fused, config, weights))

    def takes(self, batch: StepBatch) -> bool:
        """Whether it computes such a step's rows."""
        return batch.prefill is None and batch.num_tokens <= self.most_rows

    def mix(self, residual_TD: Tensor, update_TD: Tensor | None, cos_sin_TR: Tensor, batch: StepBatch) -> Tensor:
        """Norm and mixer."""
        decode = batch.decode
        assert decode is not None, "rows decode or prefill"
        if self._attends:
            rows = cos_sin_TR, batch.kv_rows_T, decode.starts_S1, decode.lengths_S, decode.pages_SN
            return cast(Attention, self.mixer)(residual_TD, update_TD, *rows)
        rows_of = decode.starts_S1, decode.lengths_S, decode.slots_S
        return cast(DeltaNet, self.mixer)(residual_TD, update_TD, *rows_of)

    def route(self, residual_TD: Tensor, mixed_TD: Tensor) -> tuple[Tensor, MixtureRows]:
        """Norm and router: the normed rows, and where they go."""
        assert self.norm_route is not None, "the layer has experts"
        x_TD, logits_TE, ids_TK, gates_TK = self.norm_route(residual_TD, mixed_TD)
        return x_TD, MixtureRows(ids_TK, gates_TK, logits_TE[:, -1], None)


def _mixer(
    fused: Fused, config: ModelConfig, weights: LayerWeights, pool: KvPool | None, delta: DeltaState | None, first: int
) -> Mixer:
    mixer, scale_D, eps = weights.mixer, weights.input_scale_D, config.rms_norm_eps
    if isinstance(mixer, AttentionWeights):
        assert pool is not None, "a layer of attention has pages"
        half = config.rotary_dim // 2
        return fused.attention(scale_D, eps, mixer.rows_PD, mixer.norm, pool, mixer.out_DX, half=half, first=first)
    assert delta is not None, "a linear layer has state slots"
    return fused.delta_net(scale_D, eps, mixer.rows_PD, mixer.delta, delta, mixer.out_DX)


def _norm_route(fused: Fused, config: ModelConfig, weights: LayerWeights) -> NormRoute | None:
    if isinstance(weights.mlp, MlpWeights):
        return None
    experts, chosen, normalise = config.num_experts, config.num_experts_per_tok, config.norm_topk_prob
    return fused.norm_route(weights.mlp_scale_D, config.rms_norm_eps, weights.mlp.inputs_ND, experts, chosen, normalise)
