"""The chips that the Triton kernels have configurations for."""

from __future__ import annotations

from enum import Enum

import torch


class Chip(Enum):
    """A data-centre GPU by its compute capability. Others have too little shared memory for these configurations."""

    A100 = 80
    H100 = 90
    B200 = 100

    @staticmethod
    def of(device: torch.device) -> Chip | None:
        """The chip of a CUDA device; None where there is no configuration for it. H200 counts as H100, B300 as B200."""
        major, minor = torch.cuda.get_device_capability(device)
        return {(8, 0): Chip.A100, (9, 0): Chip.H100, (10, 0): Chip.B200, (10, 3): Chip.B200}.get((major, minor))
