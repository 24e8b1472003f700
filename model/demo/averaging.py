"""The moving average of the weights, which is what a stage leaves.

Single steps are noisy: on two cores a batch has some hundred tokens that matter. The mean of the weights of many
steps does what many times the batch would (Izmailov et al. 2018, arXiv 1803.05407).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_DECAY = 0.998
"""Share that earlier weights keep at each step: about 500 steps count."""
_HASTE = 4
"""Steps after the first of which the average soon forgets where it began."""


class Average:
    """The average of a network's weights over the steps so far, the late ones above all."""

    def __init__(self, network: nn.Module) -> None:
        self._live = network.state_dict()
        self._mean = {name: tensor.clone() for name, tensor in self._live.items()}
        self._steps = 0

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are now."""
        self._steps += 1
        share = 1.0 - min(_DECAY, self._steps / (_HASTE + self._steps))
        torch._foreach_lerp_(list(self._mean.values()), list(self._live.values()), share)

    @property
    def weights(self) -> dict[str, Tensor]:
        """The average, by name."""
        return self._mean
