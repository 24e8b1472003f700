"""How a decoder layer reaches the routed experts, wherever they live.

Shapes: T rows, D model width, K experts per row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from divisi.kernels.mixture.layout import Routed

if TYPE_CHECKING:
    from divisi.model.experts import ExpertBank


class Pending(Protocol):
    """Routed rows on their way to the experts."""

    def combine(self) -> Routed:
        """Wait for the experts and return, per row, the sum over its experts of gate x expert(x), or its terms.

        What it returns is the dispatcher's, and valid until the next `dispatch`. Raises whatever the dispatcher defines
        for a step that cannot be finished.
        """
        ...


class Dispatcher(Protocol):
    """Carries one layer's rows to the shards that hold their experts, and their weighted sum back."""

    def dispatch(self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor, gates_TK: Tensor) -> Pending:
        """Start sending; returns at once so that the shared expert can run meanwhile.

        ``x_TD`` is in the activation dtype, ``expert_ids_TK`` int32 (ids of the whole model), ``gates_TK`` fp32.
        T >= 1.
        """
        ...


class InProcess:
    """The base of a dispatcher whose experts are in this process, all of them: who has them can do without it."""

    @property
    def bank(self) -> ExpertBank | None:
        """The experts; None while their rows are to be seen layer by layer."""
        return None
