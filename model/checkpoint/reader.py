"""`Checkpoint`: reads tensors of a model directory, memory-mapped, and only those asked for.

Shapes: E experts asked for, F = 2 * I rows of gate and up, D model dim, I expert width.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from divisi.model.checkpoint.index import DTYPE_BYTES, TensorInfo, read_index
from divisi.model.checkpoint.layout import (
    Shape,
    belongs_to_main_model,
    expert_shapes,
    main_shapes,
    packed_shapes,
)
from divisi.model.config import ModelConfig
from divisi.model.errors import CheckpointError

_MAX_OPEN = 4


class Checkpoint:
    """An open model directory. What is returned is a copy; no mapping outlives `close`."""

    def __init__(self, model_dir: Path, tensors: dict[str, TensorInfo]) -> None:
        self.model_dir = model_dir
        self.tensors = tensors
        """Every tensor by name, from the files' headers."""
        self.bytes_read = 0
        """Bytes on disk of all that was read so far."""
        self._open: OrderedDict[Path, Any] = OrderedDict()

    @classmethod
    def open(cls, model_dir: str | Path) -> Self:
        """Read the headers of `model.safetensors`, or of the files of an index. Raises CheckpointError."""
        path = Path(model_dir)
        return cls(path, read_index(path))

    def close(self) -> None:
        """Unmap all files, so that pages read no longer count as this process's memory; reading maps them again."""
        self._open.clear()

    @property
    def names(self) -> frozenset[str]:
        """Names of all tensors, those of the MTP layer too."""
        return frozenset(self.tensors)

    def shape(self, name: str) -> Shape:
        """Shape of a tensor. Raises CheckpointError where it is missing."""
        return self._info(name).shape

    def read(self, name: str, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        """Return an own, contiguous copy of a tensor in `dtype` (its own where None).

        Raises CheckpointError where it is missing, of another shape, or damaged.
        """
        self.check(name, tuple(shape))
        view = self._view(name, None)
        out = torch.empty(tuple(shape), dtype=dtype or view.dtype)
        self._copy(out, view, self.tensors[name])
        return out

    def read_experts(
        self, layer: int, expert_ids: Sequence[int], config: ModelConfig, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Return (gate_up_EFD [E, 2 * I, D], down_EDI [E, D, I]) of some experts of a layer, in the order asked for.

        Reads the published layout (a tensor per expert) and the packed one. Raises CheckpointError.
        """
        count, hidden, inner = len(expert_ids), config.hidden_size, config.moe_intermediate_size
        gate_up_EFD = torch.empty((count, 2 * inner, hidden), dtype=dtype)
        down_EDI = torch.empty((count, hidden, inner), dtype=dtype)
        if self._is_packed(config, layer):
            outputs = (gate_up_EFD, down_EDI)
            for out, (name, shape) in zip(outputs, packed_shapes(config, layer).items(), strict=True):
                self.check(name, shape)
                for at, begin, end in _runs(expert_ids):
                    self._copy(out[at : at + end - begin], self._view(name, slice(begin, end)), self.tensors[name])
            return gate_up_EFD, down_EDI
        for at, expert in enumerate(expert_ids):
            targets = (gate_up_EFD[at, :inner], gate_up_EFD[at, inner:], down_EDI[at])
            for out, (name, shape) in zip(targets, expert_shapes(config, layer, expert).items(), strict=True):
                self.check(name, shape)
                self._copy(out, self._view(name, None), self.tensors[name])
        return gate_up_EFD, down_EDI

    def check(self, name: str, shape: Shape) -> None:
        """Raise CheckpointError unless the tensor is there, of this shape, in a dtype that is read."""
        info = self._info(name)
        if info.shape != shape:
            raise CheckpointError(
                f"{name}: expected shape {list(shape)} by config.json, found {list(info.shape)} in {info.file.name}"
            )
        if info.dtype not in DTYPE_BYTES:
            raise CheckpointError(f"{name}: expected dtype BF16, F16 or F32, found {info.dtype} in {info.file.name}")

    def check_all(self, config: ModelConfig) -> None:
        """Check names, shapes and dtypes of the whole model by the headers. Raises CheckpointError.

        Those of the MTP layer are checked where the config uses it. What else is outside the main model is left alone;
        what looks like part of it but is not expected is an error, since config.json then describes another model.
        """
        expected = main_shapes(config)
        for layer in (*config.moe_layers, *config.draft_moe_layers):
            if self._is_packed(config, layer):
                expected |= packed_shapes(config, layer)
            else:
                for expert in range(config.num_experts):
                    expected |= expert_shapes(config, layer, expert)
        for name, shape in expected.items():
            self.check(name, shape)
        for name in self.tensors:
            # a tied model may store its head all the same; transformers does not read it either
            tied_head = config.tie_word_embeddings and name == "lm_head.weight"
            if name not in expected and belongs_to_main_model(name) and not tied_head:
                info = self.tensors[name]
                raise CheckpointError(
                    f"{name}: expected no such tensor by config.json, found one of shape {list(info.shape)} "
                    f"in {info.file.name}; does config.json belong to these weights?"
                )

    def _is_packed(self, config: ModelConfig, layer: int) -> bool:
        """Whether a layer's experts are in the packed form. Raises CheckpointError where both forms are there."""
        packed, single = [*packed_shapes(config, layer)][-1], [*expert_shapes(config, layer, 0)][-1]
        if packed in self.tensors and single in self.tensors:
            raise CheckpointError(
                f"{packed}: found beside {single}; expected the packed or the per-expert form, not both"
            )
        return packed in self.tensors

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise CheckpointError(
                f"{name}: missing, expected by config.json; found {len(self.tensors)} other tensors in {self.model_dir}"
            )
        return self.tensors[name]

    def _view(self, name: str, rows: slice | None) -> Tensor:
        """Map the tensor, or some of its first dimension, without reading it."""
        info = self.tensors[name]
        try:
            if info.file not in self._open:
                self._open[info.file] = safe_open(info.file, framework="pt")
                if len(self._open) > _MAX_OPEN:
                    self._open.popitem(last=False)
            self._open.move_to_end(info.file)
            file = self._open[info.file]
            view: Tensor = file.get_tensor(name) if rows is None else file.get_slice(name)[rows]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{name}: cannot be read from {info.file.name}: {error}") from None
        return view

    def _copy(self, out: Tensor, view: Tensor, info: TensorInfo) -> None:
        out.copy_(view)
        self.bytes_read += view.numel() * DTYPE_BYTES[info.dtype]


def _runs(ids: Sequence[int]) -> list[tuple[int, int, int]]:
    """Split ids into runs of consecutive ones: (place in the list, first id, last id + 1)."""
    if not ids:
        return []
    starts = [0, *(i + 1 for i, (a, b) in enumerate(pairwise(ids)) if b != a + 1)]
    return [(at, ids[at], ids[end - 1] + 1) for at, end in pairwise([*starts, len(ids)])]
