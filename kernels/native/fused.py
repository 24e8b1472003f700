"""What stands around a layer's mixer and its experts, in one call each: for steps of few rows.

Each object is made once, with the pointers of its weights and its memory, and holds on to these. Their results are to
the bit those of the operations that they stand for. Decoding rows only.

Shapes: T rows, S sequences, N pages, D model width, E experts, K experts per row.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from divisi.kernels.attention.layout import KvPool, QkNorm
from divisi.kernels.gated_delta.layout import DeltaState, DeltaWeights
from divisi.kernels.linear.layout import Matrix, PackedMatrix, plain_rows
from divisi.kernels.native.delta import LayerPointers
from divisi.kernels.native.dense import GEMM_ROWS
from divisi.kernels.native.loader import Library, pointer


def structure(name: str, **fields: type) -> type[ctypes.Structure]:
    """A mirror of the C++ structure of that name."""
    return type(name, (ctypes.Structure,), {"_fields_": [*fields.items()]})


Address, Long = ctypes.c_void_p, ctypes.c_long
MatrixStruct = structure("Matrix", values=Address, outputs=Long, inputs=Long, format=Long)
NormStruct = structure("Norm", scale=Address, eps=ctypes.c_float)
_Projection = structure("Projection", norm=NormStruct, weight=MatrixStruct)
_DeltaLayer = structure("DeltaLayer", projection=_Projection, delta=Address, out=MatrixStruct, channels=Long)
_QkNorm = structure("QkNorm", query=Address, key=Address, eps=ctypes.c_float)
_Pool = structure(
    "Pool", keys=Address, values=Address, is_bf16=Long, page_size=Long, heads=Long, dim=Long
)  # fmt: skip
_AttentionLayer = structure(
    "AttentionLayer", projection=_Projection, norm=_QkNorm, pool=_Pool, out=MatrixStruct, heads=Long, half=Long,
    tiled=Long, first=Long,
)  # fmt: skip
_Router = structure("Router", projection=_Projection, experts=Long, chosen=Long, normalise=Long)
_DraftInput = structure("DraftInput", embedding=MatrixStruct, token=NormStruct, hidden=NormStruct, fc=MatrixStruct)
_DraftEntry = structure(
    "DraftEntry", input=_DraftInput, projection=_Projection, norm=_QkNorm, pool=_Pool, half=Long, hidden=Address,
    entries=Long,
)  # fmt: skip


class Fused:
    """Makes the fused operations of a model's layers."""

    def __init__(self, library: Library, deterministic: bool) -> None:
        self.compiled, self._functions = library, library.functions
        self._deterministic = deterministic

    def most_rows(self, weight: Matrix) -> int:
        """How many rows a step may have in which a layer with such weights is computed here."""
        return sys.maxsize if self._deterministic or isinstance(weight, PackedMatrix) else GEMM_ROWS - 1

    def delta_net(
        self, scale_D: Tensor, eps: float, rows_PD: Matrix, delta: DeltaWeights, state: DeltaState, out_DX: Matrix
    ) -> DeltaNet:
        """A gated DeltaNet mixer with the norm before it."""
        return DeltaNet(self._functions, _projection(scale_D, eps, rows_PD), LayerPointers(state, delta), out_DX)

    def attention(
        self, scale_D: Tensor, eps: float, rows_PD: Matrix, norm: QkNorm, pool: KvPool, out_DX: Matrix, *, half: int,
        first: int,
    ) -> Attention:  # fmt: skip
        """A gated attention mixer with the norm before it; `half` of a head's rotary dims, `first` visible position."""
        _, heads = _size(out_DX)
        struct = _AttentionLayer(
            _projection(scale_D, eps, rows_PD), _qk_norm(norm), _pool(pool), matrix_struct(out_DX),
            heads=heads // pool.key_PJD.shape[2], half=half, first=first,
            tiled=self.compiled.variant.bf16 and pool.key_PJD.dtype is torch.bfloat16,
        )  # fmt: skip
        return Attention(self._functions, struct, (scale_D, rows_PD, norm, pool, out_DX))

    def norm_route(
        self, scale_D: Tensor, eps: float, router_ED: Matrix, experts: int, chosen: int, normalise: bool
    ) -> NormRoute:
        """Norm, router and the choice of experts."""
        struct = _Router(_projection(scale_D, eps, router_ED), experts, chosen, normalise)
        return NormRoute(self._functions, struct, (scale_D, router_ED))

    def drafts(
        self, embed_VD: Matrix, token_scale_D: Tensor, hidden_scale_D: Tensor, fc_DE: Matrix, input_scale_D: Tensor,
        kv_rows_PD: Matrix, norm: QkNorm, pool: KvPool, hidden_SND: Tensor, eps: float, half: int,
    ) -> DraftLayer:  # fmt: skip
        """What goes into the MTP layer, and what its entries come from."""
        token, hidden = norm_struct(token_scale_D, eps), norm_struct(hidden_scale_D, eps)
        given = _DraftInput(matrix_struct(embed_VD), token, hidden, matrix_struct(fc_DE))
        struct = _DraftEntry(
            given, _projection(input_scale_D, eps, kv_rows_PD), _qk_norm(norm), _pool(pool), half,
            pointer(hidden_SND), hidden_SND.shape[1],
        )  # fmt: skip
        held = (
            embed_VD, token_scale_D, hidden_scale_D, fc_DE, input_scale_D, kv_rows_PD, norm, pool, hidden_SND
        )  # fmt: skip
        return DraftLayer(self._functions, struct, held, hidden_SND.shape[2])


class _Call:
    """A structure that the C++ is shown, and all that it points to."""

    def __init__(self, functions: ctypes.CDLL, struct: ctypes.Structure, held: Sequence[object]) -> None:
        self._functions, self._struct, self._held = functions, struct, held
        self._layer = ctypes.byref(struct)

    @property
    def address(self) -> int:
        """Of the structure, which lives as long as this."""
        return ctypes.addressof(self._struct)


class DeltaNet(_Call):
    """Advances each sequence's recurrence by its rows."""

    def __init__(
        self, functions: ctypes.CDLL, projection: ctypes.Structure, delta: LayerPointers, out_DX: Matrix
    ) -> None:
        struct = _DeltaLayer(projection, ctypes.addressof(delta.struct), matrix_struct(out_DX), delta.widths[0])
        super().__init__(functions, struct, (delta, out_DX))

    def __call__(
        self, residual_TD: Tensor, update_TD: Tensor | None, starts_S1: Tensor, lengths_S: Tensor, slots_S: Tensor
    ) -> Tensor:
        """Return ``y_TD``; the residual has had the update added."""
        y_TD = torch.empty_like(residual_TD)
        self._functions.divisi_delta_layer(
            self._layer, pointer(residual_TD), None if update_TD is None else pointer(update_TD),
            pointer(starts_S1), pointer(lengths_S), pointer(slots_S), y_TD.data_ptr(), y_TD.shape[0],
            slots_S.shape[0], torch.get_num_threads(),
        )  # fmt: skip
        return y_TD


class Attention(_Call):
    """Writes the rows' keys and values to their pages and attends."""

    def __call__(
        self, residual_TD: Tensor, update_TD: Tensor | None, cos_sin_TR: Tensor, kv_rows_T: Tensor,
        starts_S1: Tensor, lengths_S: Tensor, pages_SN: Tensor,
    ) -> Tensor:  # fmt: skip
        """Return ``y_TD``; the residual has had the update added."""
        y_TD = torch.empty_like(residual_TD)
        self._functions.divisi_attention_layer(
            self._layer, pointer(residual_TD), None if update_TD is None else pointer(update_TD),
            pointer(cos_sin_TR), pointer(kv_rows_T), pointer(starts_S1), pointer(lengths_S),
            pages_SN.data_ptr(), pages_SN.stride(0), y_TD.data_ptr(), y_TD.shape[0], lengths_S.shape[0],
            torch.get_num_threads(),
        )  # fmt: skip
        return y_TD


class NormRoute(_Call):
    """Chooses each row's experts."""

    def __init__(self, functions: ctypes.CDLL, struct: ctypes.Structure, held: Sequence[object]) -> None:
        super().__init__(functions, struct, held)
        self._outputs, self._chosen = struct.projection.weight.outputs, struct.chosen

    def __call__(self, residual_TD: Tensor, update_TD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return ``x_TD``, the router's logits, ids and gates [T, K]; the residual has had the update added."""
        rows = residual_TD.shape[0]
        x_TD, logits_TE = torch.empty_like(residual_TD), torch.empty((rows, self._outputs))
        ids_TK, gates_TK = torch.empty((rows, self._chosen), dtype=torch.int32), torch.empty((rows, self._chosen))
        self._functions.divisi_norm_route(
            self._layer, pointer(residual_TD), pointer(update_TD), x_TD.data_ptr(), logits_TE.data_ptr(),
            ids_TK.data_ptr(), gates_TK.data_ptr(), rows, torch.get_num_threads(),
        )  # fmt: skip
        return x_TD, logits_TE, ids_TK, gates_TK


class DraftLayer(_Call):
    """The MTP layer's inputs and entries."""

    def __init__(self, functions: ctypes.CDLL, struct: ctypes.Structure, held: Sequence[object], width: int) -> None:
        super().__init__(functions, struct, held)
        self._width = width

    def input(
        self, token_ids_T: Tensor, h_TD: Tensor | None, starts_S1: Tensor, lengths_S: Tensor, slots_S: Tensor
    ) -> Tensor:
        """``fc`` of each row's embedding and h; None: that before the row, from the slots."""
        rows = token_ids_T.shape[0]
        y_TD = torch.empty((rows, self._width))
        self._functions.divisi_draft_input(
            self._layer, pointer(token_ids_T), None if h_TD is None else pointer(h_TD), pointer(starts_S1),
            pointer(lengths_S), pointer(slots_S), y_TD.data_ptr(), rows, slots_S.shape[0], torch.get_num_threads(),
        )  # fmt: skip
        return y_TD

    def record(
        self, token_ids_T: Tensor, h_TD: Tensor, cos_sin_TR: Tensor, kv_rows_T: Tensor, starts_S1: Tensor,
        lengths_S: Tensor, slots_S: Tensor,
    ) -> None:  # fmt: skip
        """Keep h of the rows in their slots, and write their entries."""
        self._functions.divisi_draft_record(
            self._layer, pointer(token_ids_T), pointer(h_TD), pointer(cos_sin_TR), pointer(kv_rows_T),
            pointer(starts_S1), pointer(lengths_S), pointer(slots_S), h_TD.shape[0], slots_S.shape[0],
            torch.get_num_threads(),
        )  # fmt: skip


def matrix_struct(weight: Matrix) -> ctypes.Structure:
    """Of a matrix, or of several of one size one after the other."""
    outputs, inputs = _size(weight)
    if isinstance(weight, PackedMatrix):
        return MatrixStruct(weight.data.data_ptr(), outputs, inputs, 2)
    return MatrixStruct(pointer(plain_rows(weight)), outputs, inputs, int(weight.dtype is torch.bfloat16))


def _size(weight: Matrix) -> tuple[int, int]:
    if isinstance(weight, PackedMatrix):
        return weight.outputs, weight.inputs
    rows = plain_rows(weight)
    return rows.shape[-2], rows.shape[-1]


def norm_struct(scale_D: Tensor, eps: float) -> ctypes.Structure:
    """Of an RMS norm."""
    return NormStruct(pointer(scale_D), eps)


def _projection(scale_D: Tensor, eps: float, weight: Matrix) -> ctypes.Structure:
    return _Projection(norm_struct(scale_D, eps), matrix_struct(weight))


def _qk_norm(norm: QkNorm) -> ctypes.Structure:
    return _QkNorm(pointer(norm.query_D), pointer(norm.key_D), norm.eps)


def _pool(pool: KvPool) -> ctypes.Structure:
    _, heads, dim = pool.key_PJD.shape
    keys, values = pointer(pool.key_PJD), pointer(pool.value_PJD)
    return _Pool(keys, values, pool.key_PJD.dtype is torch.bfloat16, pool.page_size, heads, dim)
