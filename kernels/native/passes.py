"""Passes of few rows through all layers, in one call each, where the experts are in this process.

Results are to the bit those of the layers one by one. Decoding rows only.

Shapes: T rows, D model width, V vocabulary, P positions, R rotary dim.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from divisi.kernels.experts.layout import Tree
from divisi.kernels.linear.layout import Matrix
from divisi.kernels.native.fused import (
    Address,
    Attention,
    DeltaNet,
    DraftLayer,
    Long,
    MatrixStruct,
    NormRoute,
    NormStruct,
    matrix_struct,
    norm_struct,
    structure,
)
from divisi.kernels.native.loader import Library, pointer
from divisi.kernels.sampling.layout import Draws

PARTS = ("mixer", "router", "shared", "experts", "draft", "sampling", "other")
"""Of a pass, in the order of passes/native.cpp. Of packed weights, `experts` is router and shared expert, too."""

_Experts = structure("Experts", gate_up=MatrixStruct, down=MatrixStruct, leaves=Address, count=Long)
_Layer = structure(
    "Layer", delta=Address, attention=Address, router=Address, norm=NormStruct, shared=_Experts, routed=_Experts
)
_Rows = structure(
    "Rows", tokens=Address, positions=Address, kv_rows=Address, starts=Address, lengths=Address, slots=Address,
    pages=Address, max_pages=Long, count=Long, sequences=Long,
)  # fmt: skip
_Model = structure(
    "Model", embedding=MatrixStruct, rotations=Address, rotary=Long, layers=Address, count=Long, last=NormStruct,
    head=MatrixStruct, drafts=Address,
)  # fmt: skip
_Draws = structure(
    "Draws", seeds=Address, temperature=Address, top_k=Address, top_p=Address, log_min_p=Address
)  # fmt: skip
_Seconds = ctypes.c_double * len(PARTS)
_MOST_KEPT = 4096
"""Shapes of a step's draft passes."""


@dataclass(frozen=True, slots=True)
class FusedLayer:
    """One layer's operations and weights; a dense one has neither a router nor routed experts."""

    mixer: DeltaNet | Attention
    router: NormRoute | None
    scale_D: Tensor
    """Of the norm before the feed-forward part."""
    shared: tuple[Matrix, Matrix]
    """Gate and up, down: of the shared expert, or of the dense layer."""
    routed: tuple[Matrix, Matrix] | None
    """Of all experts, in the order of their ids."""


class PassRows:
    """A pass's rows, see `divisi.model.batch.StepBatch`: where they lie, whatever numbers are there."""

    def __init__(
        self, tokens_T: Tensor, positions_T: Tensor, kv_rows_T: Tensor, starts_S1: Tensor, lengths_S: Tensor,
        slots_S: Tensor, pages_SN: Tensor,
    ) -> None:  # fmt: skip
        self.count = len(tokens_T)
        vectors = tokens_T, positions_T, kv_rows_T, starts_S1, lengths_S, slots_S
        self._held = *vectors, pages_SN
        struct = _Rows(
            *map(pointer, vectors), pages_SN.data_ptr(), pages_SN.stride(0), self.count, len(slots_S)
        )  # fmt: skip
        self.reference = ctypes.byref(struct)


class _DraftPasses:
    """What draft passes of so many rows each are told, and give."""

    def __init__(self, counts: Sequence[int]) -> None:
        self.counts = (ctypes.c_int64 * len(counts))(*counts)
        self.drawn_KT = (ctypes.c_int64 * (len(counts) * counts[0]))()
        self.seconds_K = (ctypes.c_double * len(counts))()


class AllDrafted(NamedTuple):
    """What the draft passes of a step give, one by one."""

    tokens: list[list[int]]
    """Of each row."""
    seconds: list[float]


class FusedPasses:
    """The layers of a model between its embedding and its head, or those that draft."""

    def __init__(
        self, library: Library, embed_VD: Matrix, cos_sin_PR: Tensor, layers: Sequence[FusedLayer], tree: Tree,
        last_scale_D: Tensor, head_VD: Matrix, eps: float, drafts: DraftLayer | None,
    ) -> None:  # fmt: skip
        """`cos_sin_PR` are the rotations of all positions; `drafts` keeps h of the rows of full passes, and begins
        draft passes.
        """
        self._functions = library.functions
        self._alone = Tree.of([0], 1)
        structs = [self._layer(layer, tree, eps) for layer in layers]
        array = (_Layer * len(structs))(*structs)
        model = _Model(
            matrix_struct(embed_VD), pointer(cos_sin_PR), cos_sin_PR.shape[1], ctypes.addressof(array), len(structs),
            norm_struct(last_scale_D, eps), matrix_struct(head_VD), None if drafts is None else drafts.address,
        )  # fmt: skip
        self._held = (array, model, layers, tree, embed_VD, cos_sin_PR, last_scale_D, head_VD, drafts)
        self._model = ctypes.byref(model)
        self._width, self._vocabulary = model.embedding.inputs, model.head.outputs
        self._seconds = _Seconds()
        self._drawn = (ctypes.c_int64 * 1)()
        self._passes: dict[tuple[int, ...], _DraftPasses] = {}
        self._last_draws: tuple[Draws | None, object] = None, None
        """As Python has them, and as C++ does: they mostly come again."""

    def full(self, rows: PassRows) -> Tensor:
        """Return ``logits_TV`` of the model."""
        logits_TV = torch.empty((rows.count, self._vocabulary))
        self._functions.divisi_full_pass(
            self._model, rows.reference, logits_TV.data_ptr(), None, None, self._seconds, torch.get_num_threads()
        )
        return logits_TV

    def draw(self, rows: PassRows, draws: Draws) -> list[int]:
        """The token after each row, drawn from the model's logits. Nothing is allocated, no operation of torch runs."""
        if len(self._drawn) < rows.count:
            self._drawn = (ctypes.c_int64 * rows.count)()
        self._functions.divisi_full_pass(
            self._model, rows.reference, None, self._draws(draws), self._drawn, self._seconds, torch.get_num_threads()
        )
        return self._drawn[: rows.count]

    def draft(self, rows: PassRows, hidden_TD: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return ``logits_TV`` of the token after each row's, and what the next pass goes on from [T, D].

        `hidden_TD` is that of the pass before; None in the first.
        """
        logits_TV, next_TD = torch.empty((rows.count, self._vocabulary)), torch.empty((rows.count, self._width))
        before = None if hidden_TD is None else pointer(hidden_TD)
        self._functions.divisi_draft_pass(
            self._model, rows.reference, before, next_TD.data_ptr(), logits_TV.data_ptr(), self._seconds,
            torch.get_num_threads(),
        )  # fmt: skip
        return logits_TV, next_TD

    def draft_all(self, rows: PassRows, counts: tuple[int, ...], draws: Draws) -> AllDrafted:
        """Run the draft passes of a step: `rows` of the first one, of which the first so many draft in each.

        Their pages reach as far as the last pass. `draws` are of the rows of the first.
        """
        if (passes := self._passes.get(counts)) is None:
            if len(self._passes) >= _MOST_KEPT:
                self._passes.clear()
            passes = self._passes[counts] = _DraftPasses(counts)
        self._functions.divisi_draft_passes(
            self._model, rows.reference, passes.counts, len(counts), self._draws(draws), passes.drawn_KT,
            passes.seconds_K, self._seconds, torch.get_num_threads(),
        )  # fmt: skip
        most, drawn = counts[0], passes.drawn_KT
        tokens = [drawn[at * most : at * most + count] for at, count in enumerate(counts)]
        return AllDrafted(tokens, passes.seconds_K[:])

    def take_seconds(self) -> dict[str, float]:
        """What each of PARTS has taken since the last call."""
        seconds = dict(zip(PARTS, self._seconds, strict=True))
        ctypes.memset(self._seconds, 0, ctypes.sizeof(self._seconds))
        return seconds

    def _draws(self, draws: Draws) -> object:
        if self._last_draws[0] is not draws:
            self._last_draws = draws, ctypes.byref(_Draws(*draws.addresses))
        return self._last_draws[1]

    def _layer(self, layer: FusedLayer, tree: Tree, eps: float) -> ctypes.Structure:
        mixer, router = layer.mixer.address, None if layer.router is None else layer.router.address
        delta, attention = (mixer, None) if isinstance(layer.mixer, DeltaNet) else (None, mixer)
        routed = _Experts() if layer.routed is None else _experts(layer.routed, tree)
        return _Layer(
            delta, attention, router, norm_struct(layer.scale_D, eps), _experts(layer.shared, self._alone), routed
        )


def _experts(matrices: tuple[Matrix, Matrix], tree: Tree) -> ctypes.Structure:
    gate_up, down = map(matrix_struct, matrices)
    return _Experts(gate_up, down, tree.leaves_E.data_ptr(), len(tree.leaves_E))
