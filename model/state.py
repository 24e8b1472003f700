"""The memory of sequences on one attention worker: KV pages and state slots, as two separate sets of pools.

Written by forward passes only. A step writes KV past the committed length, and state through the ring or a spare slot,
so that a step which is never committed leaves nothing behind.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from divisi.kernels.attention.layout import KvPool
from divisi.kernels.gated_delta.layout import DeltaState, ring_entries
from divisi.kernels.native.memory import advise_huge_pages
from divisi.kernels.select import Kernels
from divisi.model.config import ModelConfig

Pairs = Sequence[tuple[int, int]]


class StateStore:
    """One KvPool per full-attention layer and the MTP layer, one DeltaState per linear layer, the last hidden states.

    `flush` and the copies take one pair or more, and change nothing more when they are done again.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_pages: int,
        page_size: int,
        num_slots: int,
        max_rows: int = 1,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """``max_rows`` is the most rows a decoding sequence has in a step (1 + drafts); ``dtype`` is that of the KV."""
        self.num_pages, self.page_size, self.num_slots = num_pages, page_size, num_slots
        kv_shape = (num_pages * page_size, config.num_key_value_heads, config.head_dim)
        self.kv: dict[int, KvPool] = {
            layer: KvPool(
                _zeros(kv_shape, device, dtype),
                _zeros(kv_shape, device, dtype),
                page_size,
            )
            for layer in (*config.full_layers, *([config.mtp_index] if config.mtp_layers else []))
        }
        ring = ring_entries(max_rows, config.linear_conv_kernel_dim)
        shapes = [(num_slots, *shape) for shape in _slot_shapes(config, ring)]
        self.delta: dict[int, DeltaState] = {
            layer: DeltaState(
                state_SHKV=_zeros(shapes[0], device),
                conv_SRC=_zeros(shapes[1], device),
                key_SRGK=_zeros(shapes[2], device),
                delta_SRHV=_zeros(shapes[3], device),
                decay_SRH=torch.zeros(shapes[4], device=device),
                position_S=torch.zeros(num_slots, dtype=torch.int32, device=device),
            )
            for layer in config.linear_layers
        }
        hidden = (num_slots + 1, _hidden_entries(config, max_rows), config.hidden_size)  # the last is nobody's
        self.hidden_SND = torch.zeros(hidden, device=device)
        """fp32: the model's last output at the position p at entry p % N, as far as the MTP layer may need it."""

    def flush(self, kernels: Kernels, pairs: Pairs) -> None:
        """Replay rings: for each (slot, position), of distinct slots, until the slot's state stands at the position."""
        for state in self.delta.values():
            slots, upto = torch.tensor(pairs, dtype=torch.int32, device=state.position_S.device).T.contiguous()
            kernels.gated_delta_flush(state, slots, upto)

    def copy_slots(self, pairs: Pairs) -> None:
        """Copy slots with their rings and hidden states: for each (from, to). None is both."""
        _copy([self.hidden_SND, *(tensor for state in self.delta.values() for tensor in state.tensors)], pairs)

    def copy_pages(self, pairs: Pairs) -> None:
        """Copy pages in every layer with attention: for each (from, to). None is both."""
        pools = [tensor for pool in self.kv.values() for tensor in (pool.key_PJD, pool.value_PJD)]
        _copy([tensor.unflatten(0, (self.num_pages, self.page_size)) for tensor in pools], pairs)

    @staticmethod
    def bytes_per_page(config: ModelConfig, page_size: int, dtype: torch.dtype) -> int:
        """Bytes that one page costs over all layers with attention."""
        return page_size * config.kv_values_per_token * dtype.itemsize

    @staticmethod
    def bytes_per_slot(config: ModelConfig, max_rows: int = 1) -> int:
        """Bytes that one state slot costs: rings over all linear layers, and hidden states for the MTP layer."""
        ring = ring_entries(max_rows, config.linear_conv_kernel_dim)
        floats = sum(torch.Size(shape).numel() for shape in _slot_shapes(config, ring))
        hidden = _hidden_entries(config, max_rows) * config.hidden_size
        return (4 * floats + 4) * len(config.linear_layers) + 4 * hidden


def _zeros(shape: Sequence[int], device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    return advise_huge_pages(torch.empty(tuple(shape), dtype=dtype, device=device)).zero_()


def _hidden_entries(config: ModelConfig, max_rows: int) -> int:
    """A step reads the entry before its first row, and again when it is replayed, and writes those of its rows."""
    return max_rows + 1 if config.mtp_layers else 0


def _copy(tensors: Sequence[Tensor], pairs: Pairs) -> None:
    """Copy entries of the first axis."""
    assert {source for source, _ in pairs}.isdisjoint(target for _, target in pairs), "a copy is copied"
    for tensor in tensors:
        from_N, to_N = torch.tensor(pairs, device=tensor.device).T
        tensor[to_N] = tensor[from_N]


def _slot_shapes(config: ModelConfig, ring: int) -> list[tuple[int, ...]]:
    """Shapes of one slot's fp32 tensors, in the order of DeltaState."""
    groups, key_dim = config.linear_num_key_heads, config.linear_key_head_dim
    heads, value_dim = config.linear_num_value_heads, config.linear_value_head_dim
    return [
        (heads, key_dim, value_dim),
        (ring, config.conv_dim),
        (ring, groups, key_dim),
        (ring, heads, value_dim),
        (ring, heads),
    ]
