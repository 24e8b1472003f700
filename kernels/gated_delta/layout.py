"""Memory and weights of one gated DeltaNet layer, shared by all implementations.

Shapes: S state slots (in Leaves: runs), L states left, R ring entries, C conv channels (q, k, v of all heads side by
side), W conv taps, H value heads, G key heads, K key dim, V value dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class DeltaState:
    """One layer's state slots and replay rings.

    A slot's state stands at ``position_S``; what came since lies in the ring, the token of position p at entry p % R.
    The conv history is read from the ring only, so it needs no copy of its own.
    """

    state_SHKV: Tensor
    """fp32 recurrent state."""
    conv_SRC: Tensor
    """Ring of conv inputs."""
    key_SRGK: Tensor
    """Ring of normalised keys."""
    delta_SRHV: Tensor
    """Ring of beta * (v - S k): with it a replay is a rank-one update and needs no read of the state."""
    decay_SRH: Tensor
    """Ring of decay factors, in (0, 1]."""
    position_S: Tensor
    """int32: number of tokens that the slot's state has absorbed."""

    @property
    def ring(self) -> int:
        """R."""
        return self.conv_SRC.shape[1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that belongs to a slot, in the order of the fields."""
        return self.state_SHKV, self.conv_SRC, self.key_SRGK, self.delta_SRHV, self.decay_SRH, self.position_S


@dataclass(frozen=True, slots=True)
class Leaves:
    """The states that scan runs leave: run s leaves those of index ``starts[s]:starts[s + 1]``.

    A slot that receives one is no run's source in the same call, so that a call can be repeated, and receives no other.
    """

    starts_S1: Tensor
    """int32 [S + 1]."""
    positions_L: Tensor
    """int32 [L]: tokens that the state has absorbed; ascending within a run, the last at the run's end."""
    slots_L: Tensor
    """int32 [L]: slot that receives the state."""


def check_sources(state: DeltaState, lengths_S: Tensor, sources_S: Tensor, leaves: Leaves) -> None:
    """Assert that scan runs find the states that they count on, and that none is written. Waits for the device."""
    at_S = torch.where(sources_S < 0, 0, state.position_S[sources_S.clamp(min=0)])
    assert torch.equal(at_S, lengths_S), f"sources stand at {at_S.tolist()}, runs begin at {lengths_S.tolist()}"
    assert not torch.isin(leaves.slots_L, sources_S).any(), "a source would be written"


@dataclass(frozen=True, slots=True)
class DeltaWeights:
    """The small weights of the recurrence, fp32."""

    conv_WC: Tensor
    """Depthwise causal filter, oldest tap first."""
    rate_H: Tensor
    """``-exp(A_log)``."""
    dt_bias_H: Tensor
    norm_V: Tensor
    """Scale of the gated output norm."""
    eps: float


def ring_entries(max_rows: int, conv_taps: int) -> int:
    """Entries such that a step of ``max_rows`` rows never overwrites one it still reads.

    The step reads up to ``max_rows`` entries to replay and ``conv_taps - 1`` of conv history, and writes ``max_rows``.
    """
    return max_rows + max(max_rows, conv_taps - 1)


@dataclass(frozen=True, slots=True)
class DeltaDims:
    """Sizes read off a layer's tensors. A projected row is ``[q GK | k GK | v HV | z HV | b H | a H]``."""

    key_heads: int
    key_dim: int
    value_heads: int
    value_dim: int

    @staticmethod
    def of(state: DeltaState) -> DeltaDims:
        """Read the sizes off a layer's memory."""
        _, _, key_heads, key_dim = state.key_SRGK.shape
        _, _, value_heads, value_dim = state.delta_SRHV.shape
        return DeltaDims(key_heads, key_dim, value_heads, value_dim)

    @property
    def conv_channels(self) -> int:
        """C."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim

    @property
    def row_splits(self) -> list[int]:
        """Widths of ``[conv inputs, z, b, a]`` in a projected row."""
        return [self.conv_channels, self.value_heads * self.value_dim, self.value_heads, self.value_heads]
