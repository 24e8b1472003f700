"""What the planner asks of a model: the weights and memory that a mean layer of it goes through. Imports no torch."""

from __future__ import annotations

from divisi.cluster.dispatch.planner import Layer
from divisi.model.config import DTYPE_BYTES, ModelConfig
from divisi.model.placement import shard_experts

_FP32 = 4


def layer_of(config: ModelConfig, shards: int, virtual_shards: int) -> Layer:
    """The mean over all layers, with a shard's part of the experts."""
    of_weight, width = DTYPE_BYTES[config.dtype], config.hidden_size
    linear, full, layers = len(config.linear_layers), len(config.full_layers), config.num_hidden_layers
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    values = config.linear_num_value_heads * config.linear_value_head_dim
    heads, kv_heads = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    of_linear = width * (2 * keys + 3 * values + 2 * config.linear_num_value_heads)
    of_full = width * (3 * heads + 2 * kv_heads)
    mixture = width * (config.num_experts + 3 * config.shared_expert_intermediate_size)
    state = config.linear_num_value_heads * config.linear_key_head_dim * config.linear_value_head_dim
    held = len(shard_experts(config, shards, virtual_shards)[0].expert_ids)
    return Layer(
        weight_bytes=of_weight * ((linear * of_linear + full * of_full) / layers + mixture),
        state_bytes=_FP32 * linear * state / layers,
        expert_bytes=of_weight * 3 * width * config.moe_intermediate_size,
        held=held,
        visited=config.num_experts_per_tok * held / config.num_experts,
    )
