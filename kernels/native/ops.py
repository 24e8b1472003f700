"""The C++ kernels under the signatures of the references. CPU tensors; fp32 activations; fp32 or bf16 weights.

Shapes: as in the reference of each operation.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from divisi.kernels.attention.layout import KvPool, QkNorm
from divisi.kernels.attention.reference import attend_runs
from divisi.kernels.experts.layout import Tree
from divisi.kernels.gated_delta.layout import DeltaDims, DeltaState, DeltaWeights, Leaves, check_sources
from divisi.kernels.linear.layout import Matrix, PackedMatrix, packed_values
from divisi.kernels.native.loader import Library
from divisi.kernels.native.memory import advise_huge_pages

# From this many rows on, a matrix product is bound by arithmetic and torch's blocked GEMM wins.
_GEMM_ROWS = 48
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


class _Layer:
    """A delta layer's pointers. Holds the layer itself, so that the pointers stay good and its id is nobody else's."""

    def __init__(self, state: DeltaState, weights: DeltaWeights | None) -> None:
        dims = DeltaDims.of(state)
        self._held = state, weights
        self._struct = _Delta(
            *map(Tensor.data_ptr, state.tensors), ring=state.ring, key_heads=dims.key_heads, key_dim=dims.key_dim,
            value_heads=dims.value_heads, value_dim=dims.value_dim,
        )  # fmt: skip
        if weights is not None:
            self._struct.taps, self._struct.num_taps = weights.conv_WC.data_ptr(), weights.conv_WC.shape[0]
            self._struct.rate, self._struct.dt_bias = weights.rate_H.data_ptr(), weights.dt_bias_H.data_ptr()
            self._struct.norm, self._struct.eps = weights.norm_V.data_ptr(), weights.eps
        self.reference = ctypes.byref(self._struct)
        self.widths = dims.conv_channels, dims.value_heads * dims.value_dim
        """Of rows of conv outputs, and of what the layer puts out."""


class NativeKernels:
    """Calls the library with as many threads as torch has in the calling thread at that time.

    Packed weights, which bf16 weights are where the processor has dot products of them, have one kernel for any number
    of rows. With others torch takes over where it is faster: products of many rows, and the attention of prefilling
    rows. Its results depend on how many rows it is given. With ``deterministic`` it never does, and a row's result
    depends neither on the rows beside it nor on how the prompt is cut, nor on whether the row is decoded or scanned.
    """

    def __init__(self, library: Library, deterministic: bool = False) -> None:
        self._library = library.functions
        self._packs = library.variant.bf16
        self._deterministic = deterministic
        self._bf16_gemm = torch.ops.mkldnn._is_mkldnn_bf16_supported()
        self._alone = Tree.of([0], 1)
        self._layers: dict[tuple[int, int], _Layer] = {}

    def pack_linear(self, weight_NK: Tensor) -> Matrix:
        if not self._packs or weight_NK.dtype is not torch.bfloat16:
            return weight_NK
        outputs, inputs = weight_NK.shape
        return PackedMatrix(self._pack(weight_NK[None], outputs, halves=False)[0], outputs, inputs)

    def pack_experts(self, gate_up_EFD: Tensor, down_EDI: Tensor) -> tuple[Matrix, Matrix]:
        if not self._packs or gate_up_EFD.dtype is not torch.bfloat16:
            return gate_up_EFD, down_EDI
        _, width, inner = down_EDI.shape
        gate_up = PackedMatrix(self._pack(gate_up_EFD, inner, halves=True), 2 * inner, width)
        return gate_up, PackedMatrix(self._pack(down_EDI, width, halves=False), width, inner)

    def pack_mlp(self, gate_up_FD: Tensor, down_DI: Tensor) -> tuple[Matrix, Matrix]:
        if not self._packs or gate_up_FD.dtype is not torch.bfloat16:
            return gate_up_FD, down_DI
        return self.pack_experts(gate_up_FD[None], down_DI[None])

    def _pack(self, weights_ENK: Tensor, outputs: int, *, halves: bool) -> Tensor:
        count, rows, inputs = weights_ENK.shape
        values = packed_values(outputs, inputs) * (2 if halves else 1)
        packed = advise_huge_pages(torch.empty((count, values), dtype=weights_ENK.dtype))
        self._library.divisi_pack(
            _pointer(weights_ENK), packed.data_ptr(), count, rows, inputs, halves, torch.get_num_threads()
        )
        return packed

    def linear(self, x_TK: Tensor, weight_NK: Matrix) -> Tensor:
        tokens, inputs = x_TK.shape
        if isinstance(weight_NK, PackedMatrix):
            outputs = weight_NK.outputs
            y_TN = torch.empty((tokens, outputs))
            self._library.divisi_packed_linear(
                _pointer(x_TK), weight_NK.data.data_ptr(), y_TN.data_ptr(), tokens, outputs, inputs,
                torch.get_num_threads(),
            )  # fmt: skip
            return y_TN
        if tokens >= _GEMM_ROWS and not self._deterministic:
            return self._gemm(x_TK, weight_NK)
        outputs = weight_NK.shape[0]
        y_TN = torch.empty((tokens, outputs))
        is_bf16 = weight_NK.dtype is torch.bfloat16
        self._library.divisi_linear(
            _pointer(x_TK),
            weight_NK.data_ptr(),
            is_bf16,
            y_TN.data_ptr(),
            tokens,
            outputs,
            inputs,
            torch.get_num_threads(),
        )
        return y_TN

    def _gemm(self, x_TK: Tensor, weight_NK: Tensor) -> Tensor:
        if weight_NK.dtype is torch.bfloat16 and self._bf16_gemm:
            return torch.nn.functional.linear(x_TK.bfloat16(), weight_NK).float()
        return torch.nn.functional.linear(x_TK, weight_NK.float())

    def embed(self, weight_NK: Matrix, rows_T: Tensor) -> Tensor:
        if isinstance(weight_NK, Tensor):
            return weight_NK[rows_T]
        out_TK = torch.empty((rows_T.shape[0], weight_NK.inputs))
        self._library.divisi_packed_rows(
            weight_NK.data.data_ptr(), _pointer(rows_T), out_TK.data_ptr(), rows_T.shape[0],
            weight_NK.outputs, weight_NK.inputs,
        )  # fmt: skip
        return out_TK

    def mlp(self, x_TD: Tensor, gate_up_FD: Matrix, down_DI: Matrix) -> Tensor:
        if isinstance(gate_up_FD, PackedMatrix):  # the only expert, of all rows
            return self._packed_experts(x_TD, None, None, self._alone, gate_up_FD, down_DI)
        return self.linear(self.silu_mul(self.linear(x_TD, gate_up_FD)), down_DI)

    def rms_norm(self, x_TD: Tensor, scale_D: Tensor, eps: float) -> Tensor:
        return self._norm(x_TD, None, scale_D, eps)

    def add_rms_norm(self, residual_TD: Tensor, update_TD: Tensor, scale_D: Tensor, eps: float) -> Tensor:
        return self._norm(residual_TD, _pointer(update_TD), scale_D, eps)

    def _norm(self, x_TD: Tensor, update: int | None, scale_D: Tensor, eps: float) -> Tensor:
        out_TD = torch.empty_like(x_TD)
        self._library.divisi_add_rms_norm(
            _pointer(x_TD), update, scale_D.data_ptr(), out_TD.data_ptr(), x_TD.shape[0], x_TD.shape[1], eps
        )
        return out_TD

    def silu_mul(self, gate_up_TI2: Tensor) -> Tensor:
        tokens, width = gate_up_TI2.shape
        out_TI = torch.empty((tokens, width // 2))
        self._library.divisi_silu_mul(
            _pointer(gate_up_TI2), out_TI.data_ptr(), tokens, width // 2, torch.get_num_threads()
        )
        return out_TI

    def route(self, logits_TE: Tensor, num_chosen: int, normalise: bool) -> tuple[Tensor, Tensor]:
        assert logits_TE.stride(1) == 1
        tokens, experts = logits_TE.shape
        ids_TK = torch.empty((tokens, num_chosen), dtype=torch.int32)
        gates_TK = torch.empty((tokens, num_chosen))
        self._library.divisi_route(
            logits_TE.data_ptr(), logits_TE.stride(0), ids_TK.data_ptr(), gates_TK.data_ptr(),
            tokens, experts, num_chosen, normalise, torch.get_num_threads(),
        )  # fmt: skip
        return ids_TK, gates_TK

    def routed_experts(
        self,
        x_TD: Tensor,
        local_ids_TK: Tensor,
        gates_TK: Tensor,
        tree: Tree,
        gate_up_EFD: Matrix,
        down_EDI: Matrix,
    ) -> Tensor:
        if isinstance(gate_up_EFD, PackedMatrix):
            return self._packed_experts(x_TD, local_ids_TK, gates_TK, tree, gate_up_EFD, down_EDI)
        assert isinstance(down_EDI, Tensor), "both are packed, or none"
        (tokens, chosen), (experts, width, inner) = local_ids_TK.shape, down_EDI.shape
        y_TD = torch.empty((tokens, width))
        inner_PI = torch.empty((tokens * chosen, inner))
        parts_PD = torch.empty((tokens * chosen, width))
        self._library.divisi_experts(
            _pointer(x_TD), _pointer(local_ids_TK), _pointer(gates_TK), tree.leaves_E.data_ptr(),
            gate_up_EFD.data_ptr(), down_EDI.data_ptr(), gate_up_EFD.dtype is torch.bfloat16,
            inner_PI.data_ptr(), parts_PD.data_ptr(), y_TD.data_ptr(),
            tokens, chosen, width, inner, experts, torch.get_num_threads(),
        )  # fmt: skip
        return y_TD

    def _packed_experts(
        self,
        x_TD: Tensor,
        ids_TK: Tensor | None,
        gates_TK: Tensor | None,
        tree: Tree,
        gate_up: PackedMatrix,
        down: Matrix,
    ) -> Tensor:
        """Without ids all rows go to the only expert, unweighted."""
        assert isinstance(down, PackedMatrix), "both are packed, or none"
        tokens, chosen = (x_TD.shape[0], 1) if ids_TK is None else ids_TK.shape
        ids, gates = (None if values is None else _pointer(values) for values in (ids_TK, gates_TK))
        y_TD = torch.empty((tokens, down.outputs))
        self._library.divisi_packed_experts(
            _pointer(x_TD), ids, gates, tree.leaves_E.data_ptr(), gate_up.data.data_ptr(), down.data.data_ptr(),
            y_TD.data_ptr(), tokens, chosen, down.outputs, down.inputs, down.data.shape[0], torch.get_num_threads(),
        )  # fmt: skip
        return y_TD

    def add_shared(self, routed_TD: Tensor, shared_TD: Tensor, logits_T: Tensor) -> Tensor:
        tokens, width = shared_TD.shape
        y_TD = torch.empty((tokens, width))
        self._library.divisi_add_shared(
            _pointer(routed_TD), _pointer(shared_TD), logits_T.data_ptr(), logits_T.stride(0), y_TD.data_ptr(),
            tokens, width, torch.get_num_threads(),
        )  # fmt: skip
        return y_TD

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
        self._library.divisi_gated_delta_decode(
            layer.reference, _pointer(rows_TP), mixed_TC.data_ptr(), out_TX.data_ptr(),
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
        self._library.divisi_gated_delta_prefill(
            layer.reference, _pointer(rows_TP), mixed_TC.data_ptr(), out_TX.data_ptr(),
            _pointer(starts_S1), _pointer(lengths_S), _pointer(sources_S), _pointer(leaves.starts_S1),
            _pointer(leaves.positions_L), _pointer(leaves.slots_L), lengths_S.shape[0], torch.get_num_threads(),
        )  # fmt: skip
        return out_TX

    def gated_delta_flush(self, state: DeltaState, slots_N: Tensor, upto_N: Tensor) -> None:
        layer, threads = self._delta(state), torch.get_num_threads()
        self._library.divisi_gated_delta_flush(
            layer.reference, _pointer(slots_N), _pointer(upto_N), slots_N.shape[0], threads
        )

    def _delta(self, state: DeltaState, weights: DeltaWeights | None = None) -> _Layer:
        """What the C++ is told of a layer, made once for each."""
        key = id(state), id(weights)
        if key not in self._layers:
            if len(self._layers) == _MOST_LAYERS:
                self._layers.clear()
            self._layers[key] = _Layer(state, weights)
        return self._layers[key]

    def attention_inputs(
        self, rows_TP: Tensor, cos_sin_TR: Tensor, norm: QkNorm, pool: KvPool, kv_rows_T: Tensor, num_heads: int
    ) -> Tensor:
        _, kv_heads, dim = pool.key_PJD.shape
        tokens = rows_TP.shape[0]
        q_TQD = torch.empty((tokens, num_heads, dim))
        self._library.divisi_attention_inputs(
            _pointer(rows_TP), _pointer(cos_sin_TR), norm.query_D.data_ptr(), norm.key_D.data_ptr(), norm.eps,
            pool.key_PJD.data_ptr(), pool.value_PJD.data_ptr(), pool.key_PJD.dtype is torch.bfloat16,
            _pointer(kv_rows_T), q_TQD.data_ptr(), tokens, num_heads, kv_heads, dim, cos_sin_TR.shape[1] // 2,
            torch.get_num_threads(),
        )  # fmt: skip
        return q_TQD

    def attention_decode(
        self,
        q_TQD: Tensor,
        rows_TP: Tensor,
        pool: KvPool,
        starts_S1: Tensor,
        lengths_S: Tensor,
        pages_SN: Tensor,
        first: int = 0,
    ) -> Tensor:
        tokens, heads, dim = q_TQD.shape
        out_TX = torch.empty((tokens, heads * dim))
        if self._tiles(pool):
            self._library.divisi_tiled_attention(
                _pointer(q_TQD), _pointer(rows_TP), pool.key_PJD.data_ptr(), pool.value_PJD.data_ptr(), pool.page_size,
                _pointer(starts_S1), _pointer(lengths_S), pages_SN.data_ptr(), pages_SN.stride(0), first,
                out_TX.data_ptr(), lengths_S.shape[0], heads, pool.key_PJD.shape[1], dim, torch.get_num_threads(),
            )  # fmt: skip
            return out_TX
        self._library.divisi_attention(
            _pointer(q_TQD), _pointer(rows_TP), pool.key_PJD.data_ptr(), pool.value_PJD.data_ptr(),
            pool.key_PJD.dtype is torch.bfloat16, pool.page_size, _pointer(starts_S1), _pointer(lengths_S),
            pages_SN.data_ptr(), pages_SN.stride(0), first, out_TX.data_ptr(), lengths_S.shape[0], heads,
            pool.key_PJD.shape[1], dim, torch.get_num_threads(),
        )  # fmt: skip
        return out_TX

    def attention_prefill(
        self, q_TQD: Tensor, rows_TP: Tensor, pool: KvPool, starts_S1: Tensor, lengths_S: Tensor, pages_SN: Tensor
    ) -> Tensor:
        attend = self.attention_decode if self._deterministic or self._tiles(pool) else attend_runs
        return attend(q_TQD, rows_TP, pool, starts_S1, lengths_S, pages_SN)

    def _tiles(self, pool: KvPool) -> bool:
        """Whether scanned and decoded rows attend alike, tile by tile."""
        return self._packs and pool.key_PJD.dtype is torch.bfloat16


def _pointer(tensor: Tensor) -> int:
    assert tensor.is_contiguous()
    return tensor.data_ptr()
