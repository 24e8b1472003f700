"""Which tensors each rank loads, and how many bytes they are, without reading any."""

from __future__ import annotations

import math
from collections.abc import Mapping

from divisi.model.checkpoint.index import TensorInfo
from divisi.model.checkpoint.layout import expert_shapes, main_shapes, packed_shapes
from divisi.model.config import DTYPE_BYTES, ModelConfig
from divisi.model.placement import Role, runs_of


def rank_tensors(config: ModelConfig, tensors: Mapping[str, TensorInfo] | None, role: Role) -> dict[str, int]:
    """Return {tensor: bytes on disk} that a rank reads.

    `tensors` is a checkpoint's index; None stands for the published layout in the config's dtype. The share of
    a packed tensor is named with the expert ids, as in `...experts.down_proj[0:16,32:48]`.
    """
    share: dict[str, int] = {}
    element = DTYPE_BYTES[config.dtype]

    def add(name: str, shape: tuple[int, ...]) -> None:
        known = tensors.get(name) if tensors is not None else None
        share[name] = known.num_bytes if known is not None else math.prod(shape) * element

    if role.attention:
        for name, shape in main_shapes(config).items():
            add(name, shape)
    if role.experts:
        for layer in (*config.moe_layers, *config.draft_moe_layers):
            if tensors is not None and all(name in tensors for name in packed_shapes(config, layer)):
                for name in packed_shapes(config, layer):
                    label = f"{name}[{runs_of(role.experts)}]"
                    share[label] = tensors[name].num_bytes * len(role.experts) // config.num_experts
            else:
                for expert in role.experts:
                    for name, shape in expert_shapes(config, layer, expert).items():
                        add(name, shape)
    return share
