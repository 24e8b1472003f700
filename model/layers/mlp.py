"""Feed-forward parts: dense SwiGLU, and the mixture of experts.

Shapes: T rows, D model width.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from divisi.kernels.mixture.layout import MixtureMatrices, MixtureRows, Update
from divisi.kernels.select import Kernels
from divisi.model.dispatcher import Dispatcher
from divisi.model.stopwatch import Stopwatch
from divisi.model.weights import MlpWeights

Answer = Callable[[], Update]
"""Waits for the rows of a layer that are with the experts, if any are; to be called once."""


def dense(kernels: Kernels, weights: MlpWeights, x_TD: Tensor) -> Tensor:
    """SwiGLU; return ``y_TD``."""
    return kernels.mlp(x_TD, weights.gate_up_FD, weights.down_DI)


def mixture(
    kernels: Kernels,
    weights: MixtureMatrices,
    layer: int,
    x_TD: Tensor,
    rows: MixtureRows,
    dispatcher: Dispatcher,
    stopwatch: Stopwatch,
) -> Answer:
    """Send off, run the shared expert while the tokens travel; the answer combines, and is valid until the next layer
    dispatches.
    """
    pending = dispatcher.dispatch(layer, x_TD, rows.ids_TK, rows.gates_TK)
    stopwatch.lap("dispatch")
    shared_TD = kernels.mixture.shared(x_TD, rows, weights)
    stopwatch.lap("shared")

    def combined() -> Update:
        update = kernels.mixture.combined(pending.combine(), shared_TD, rows.gate_T)
        stopwatch.lap("experts")
        return update

    return combined
