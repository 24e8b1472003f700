"""A decoder layer over one worker's memory: a mixer, then a feed-forward part, each behind its norm.

Shapes: T rows, D model width, R rotary dim.
"""

from __future__ import annotations

from torch import Tensor

from divisi.kernels.mixture.layout import Update
from divisi.kernels.select import Kernels
from divisi.model.batch import StepBatch
from divisi.model.config import ModelConfig
from divisi.model.dispatcher import Dispatcher
from divisi.model.layers.fused import FusedBlock
from divisi.model.layers.mixer import attention, delta_net
from divisi.model.layers.mlp import Answer, dense, mixture
from divisi.model.state import StateStore
from divisi.model.stopwatch import Stopwatch
from divisi.model.weights import AttentionWeights, LayerWeights, MlpWeights


class Block:
    """One layer's weights and memory; `first` is the first position that its attention sees."""

    def __init__(
        self,
        config: ModelConfig,
        kernels: Kernels,
        weights: LayerWeights,
        index: int,
        store: StateStore,
        first: int = 0,
    ) -> None:
        self._config, self._kernels, self._weights, self._index, self._first = config, kernels, weights, index, first
        self._pool, self._delta = store.kv.get(index), store.delta.get(index)
        self.fused: FusedBlock | None = None
        """Its operations for steps of few rows; None where they are not all there."""
        if kernels.fused is not None:
            self.fused = FusedBlock.of(kernels.fused, config, weights, self._pool, self._delta, first)

    def mix(self, residual_TD: Tensor, update: Update | None, cos_sin_TR: Tensor, batch: StepBatch) -> Tensor:
        """Add the update to the residual, and return the mixer's own."""
        if self.fused is not None and self.fused.takes(batch):
            assert update is None or isinstance(update, Tensor), "where operations are fused, updates are summed"
            return self.fused.mix(residual_TD, update, cos_sin_TR, batch)
        scale_D, eps = self._weights.input_scale_D, self._config.rms_norm_eps
        if update is None:
            x_TD = self._kernels.rms_norm(residual_TD, scale_D, eps)
        else:
            x_TD = self._kernels.mixture.add_norm(residual_TD, update, scale_D, eps)
        mixer = self._weights.mixer
        if isinstance(mixer, AttentionWeights):
            assert self._pool is not None, "a layer of attention has pages"
            heads = self._config.num_attention_heads
            return attention(self._kernels, mixer, self._pool, heads, x_TD, cos_sin_TR, batch, self._first)
        assert self._delta is not None, "a linear layer has state slots"
        return delta_net(self._kernels, mixer, self._delta, x_TD, batch)

    def feed(
        self, residual_TD: Tensor, mixed_TD: Tensor, batch: StepBatch, dispatcher: Dispatcher, stopwatch: Stopwatch
    ) -> Answer:
        """Add the mixer's output to the residual, and begin the feed-forward part, whose output is the answer."""
        scale_D, eps, mlp = self._weights.mlp_scale_D, self._config.rms_norm_eps, self._weights.mlp
        if isinstance(mlp, MlpWeights):
            x_TD = self._kernels.add_rms_norm(residual_TD, mixed_TD, scale_D, eps)
            y_TD = dense(self._kernels, mlp, x_TD)
            stopwatch.lap("experts")
            return lambda: y_TD
        if self.fused is not None and self.fused.takes(batch):
            x_TD, rows = self.fused.route(residual_TD, mixed_TD)
        else:
            x_TD = self._kernels.add_rms_norm(residual_TD, mixed_TD, scale_D, eps)
            chosen, normalise = self._config.num_experts_per_tok, self._config.norm_topk_prob
            rows = self._kernels.mixture.inputs(x_TD, mlp, chosen, normalise, batch.padded_starts_S1)
        stopwatch.lap("router")
        return mixture(self._kernels, mlp, self._index, x_TD, rows, dispatcher, stopwatch)
