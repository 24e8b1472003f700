"""Feed-forward parts: dense SwiGLU, and the mixture of experts.

Shapes: T rows, D model width, E experts.
"""

from __future__ import annotations

from torch import Tensor

from divisi.kernels.select import Kernels
from divisi.model.config import ModelConfig
from divisi.model.dispatcher import Dispatcher
from divisi.model.stopwatch import Stopwatch
from divisi.model.weights import MlpWeights, MoeWeights


def dense(kernels: Kernels, weights: MlpWeights, x_TD: Tensor) -> Tensor:
    """SwiGLU; return ``y_TD``."""
    return kernels.mlp(x_TD, weights.gate_up_FD, weights.down_DI)


def mixture(
    kernels: Kernels,
    weights: MoeWeights,
    config: ModelConfig,
    layer: int,
    x_TD: Tensor,
    dispatcher: Dispatcher,
    stopwatch: Stopwatch,
) -> Tensor:
    """Route, send off, run the shared expert while the tokens travel, combine; return ``y_TD``."""
    logits_TE = kernels.linear(x_TD, weights.router_ED)
    expert_ids_TK, gates_TK = kernels.route(
        logits_TE[:, : config.num_experts], config.num_experts_per_tok, config.norm_topk_prob
    )
    stopwatch.lap("router")
    pending = dispatcher.dispatch(layer, x_TD, expert_ids_TK, gates_TK)
    stopwatch.lap("dispatch")
    shared_TD = dense(kernels, weights.shared, x_TD)
    stopwatch.lap("shared")
    y_TD = kernels.add_shared(pending.combine(), shared_TD, logits_TE[:, config.num_experts])
    stopwatch.lap("experts")
    return y_TD
