"""Feed-forward parts: dense SwiGLU, and the mixture of experts.

Shapes: T rows, D model width, E experts, K experts per row.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from divisi.kernels.select import Kernels
from divisi.model.config import ModelConfig
from divisi.model.dispatcher import Dispatcher
from divisi.model.stopwatch import Stopwatch
from divisi.model.weights import MlpWeights, MoeWeights


def dense(kernels: Kernels, weights: MlpWeights, x_TD: Tensor) -> Tensor:
    """SwiGLU; return ``y_TD``."""
    return kernels.mlp(x_TD, weights.gate_up_FD, weights.down_DI)


class Routed(NamedTuple):
    """Rows, and where they go."""

    x_TD: Tensor
    expert_ids_TK: Tensor
    gates_TK: Tensor
    shared_T: Tensor
    """Logits of the shared expert's gate."""


def route(kernels: Kernels, weights: MoeWeights, config: ModelConfig, x_TD: Tensor) -> Routed:
    """Choose the experts of normed rows."""
    logits_TE = kernels.linear(x_TD, weights.router_ED)
    expert_ids_TK, gates_TK = kernels.route(
        logits_TE[:, : config.num_experts], config.num_experts_per_tok, config.norm_topk_prob
    )
    return Routed(x_TD, expert_ids_TK, gates_TK, logits_TE[:, config.num_experts])


def mixture(
    kernels: Kernels, weights: MoeWeights, layer: int, routed: Routed, dispatcher: Dispatcher, stopwatch: Stopwatch
) -> Tensor:
    """Send off, run the shared expert while the tokens travel, combine; return ``y_TD``."""
    pending = dispatcher.dispatch(layer, routed.x_TD, routed.expert_ids_TK, routed.gates_TK)
    stopwatch.lap("dispatch")
    shared_TD = dense(kernels, weights.shared, routed.x_TD)
    stopwatch.lap("shared")
    y_TD = kernels.add_shared(pending.combine(), shared_TD, routed.shared_T)
    stopwatch.lap("experts")
    return y_TD
