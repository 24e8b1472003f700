"""The gated delta rule in C++.

Shapes: as in its reference.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from divisi.kernels.gated_delta.layout import DeltaDims, DeltaState, DeltaWeights, Leaves, check_sources
from divisi.kernels.native.loader import Library, pointer

_MOST_LAYERS = 1024
"""That are remembered at once."""


class _Delta(ctypes.Structure):
    """Mirror of ``struct Delta`` in gated_delta/native.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("state", "conv", "key", "delta", "decay", "position")),
        *((name, ctypes.c_void_p) for name in ("taps", "rate", "dt_bias", "norm")),
        *((name, ctypes.c_long) for name in ("ring", "num_taps", "key_heads", "key_dim", "value_heads", "value_dim")),
        ("eps", ctypes.c_float),
    ]


class LayerPointers:
    """A delta layer's pointers. Holds the layer itself, so that the pointers stay good and its id is nobody else's."""

    def __init__(self, state: DeltaState, weights: DeltaWeights | None) -> None:
        dims = DeltaDims.of(state)
        self._held = state, weights
        self.struct = _Delta(
            *map(Tensor.data_ptr, state.tensors), ring=state.ring, key_heads=dims.key_heads, key_dim=dims.key_dim,
            value_heads=dims.value_heads, value_dim=dims.value_dim,
        )  # fmt: skip
        if weights is not None:
            self.struct.taps, self.struct.num_taps = weights.conv_WC.data_ptr(), weights.conv_WC.shape[0]
            self.struct.rate, self.struct.dt_bias = weights.rate_H.data_ptr(), weights.dt_bias_H.data_ptr()
            self.struct.norm, self.struct.eps = weights.norm_V.data_ptr(), weights.eps
        self.reference = ctypes.byref(self.struct)
        self.widths = dims.conv_channels, dims.value_heads * dims.value_dim
        """Of rows of conv outputs, and of what the layer puts out."""


class GatedDelta:
    """Layers over state slots."""

    def __init__(self, library: Library) -> None:
        self._functions = library.functions
        self._layers: dict[tuple[int, int], LayerPointers] = {}

    def gated_delta_decode(
        self,
        rows_TP: Tensor,
        weights: DeltaWeights,
        state: DeltaState,
        starts_S1: Tensor,
        lengths_S: Tensor,
        slots_S: Tensor,
    ) -> Tensor:
        layer = self._delta(state, weights)
        mixed_TC, out_TX = (torch.empty((rows_TP.shape[0], width)) for width in layer.widths)
        self._functions.divisi_gated_delta_decode(
            layer.reference, pointer(rows_TP), mixed_TC.data_ptr(), out_TX.data_ptr(),
            starts_S1.data_ptr(), lengths_S.data_ptr(), slots_S.data_ptr(), slots_S.shape[0], torch.get_num_threads(),
        )  # fmt: skip
        return out_TX

    def gated_delta_prefill(
        self,
        rows_TP: Tensor,
        weights: DeltaWeights,
        state: DeltaState,
        starts_S1: Tensor,
        lengths_S: Tensor,
        sources_S: Tensor,
        leaves: Leaves,
    ) -> Tensor:
        check_sources(state, lengths_S, sources_S, leaves)
        layer = self._delta(state, weights)
        mixed_TC, out_TX = (torch.empty((rows_TP.shape[0], width)) for width in layer.widths)
        self._functions.divisi_gated_delta_prefill(
            layer.reference, pointer(rows_TP), mixed_TC.data_ptr(), out_TX.data_ptr(),
            pointer(starts_S1), pointer(lengths_S), pointer(sources_S), pointer(leaves.starts_S1),
            pointer(leaves.positions_L), pointer(leaves.slots_L), lengths_S.shape[0], torch.get_num_threads(),
        )  # fmt: skip
        return out_TX

    def gated_delta_flush(self, state: DeltaState, slots_N: Tensor, upto_N: Tensor) -> None:
        layer, threads = self._delta(state), torch.get_num_threads()
        self._functions.divisi_gated_delta_flush(
            layer.reference, pointer(slots_N), pointer(upto_N), slots_N.shape[0], threads
        )

    def _delta(self, state: DeltaState, weights: DeltaWeights | None = None) -> LayerPointers:
        """What the C++ is told of a layer, made once for each."""
        key = id(state), id(weights)
        if key not in self._layers:
            if len(self._layers) == _MOST_LAYERS:
                self._layers.clear()
            self._layers[key] = LayerPointers(state, weights)
        return self._layers[key]
