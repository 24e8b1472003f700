"""What packed weights take beyond the checkpoint's values: zeros that fill up blocks, and what is held twice."""

from __future__ import annotations

from collections.abc import Iterator

from divisi.kernels.linear.layout import packed_values
from divisi.model.config import ModelConfig
from divisi.model.placement import Role

_BYTES = 2


def packing_bytes(config: ModelConfig, role: Role) -> int:
    """Bytes that a rank holds in addition where bf16 weights are packed, as on a CPU with dot products of bf16."""
    shapes: list[tuple[int, int]] = []
    if role.attention:
        layers = [*range(config.num_hidden_layers), *([config.mtp_index] if config.mtp_layers else [])]
        for layer in layers:
            shapes += [*_mixer(config, layer), *_mlp(config, layer)]
        shapes.append((config.vocab_size, config.hidden_size))
    second = 0
    if role.attention and config.mtp_layers:
        shapes.append((config.hidden_size, 2 * config.hidden_size))
        second = packed_values(2 * config.num_key_value_heads * config.head_dim, config.hidden_size)
    if role.experts:
        inner, width = config.moe_intermediate_size, config.hidden_size
        matrices = [(inner, width), (inner, width), (width, inner)]
        shapes += len(role.experts) * len((*config.moe_layers, *config.draft_moe_layers)) * matrices
    return _BYTES * (second + sum(packed_values(*shape) - shape[0] * shape[1] for shape in shapes))


def matrices_of_a_token(config: ModelConfig) -> int:
    """Values of the matrices that a token passes through, its experts among them; not the head."""
    total = 0
    for layer in range(config.num_hidden_layers):
        total += sum(rows * inputs for rows, inputs in (*_mixer(config, layer), *_mlp(config, layer)))
    return total + len(config.moe_layers) * config.num_experts_per_tok * 3 * (
        config.moe_intermediate_size * config.hidden_size
    )


def _mixer(config: ModelConfig, layer: int) -> Iterator[tuple[int, int]]:
    width = config.hidden_size
    if layer in config.linear_layers:
        values = config.linear_num_value_heads * config.linear_value_head_dim
        yield config.conv_dim + values + 2 * config.linear_num_value_heads, width
        yield width, values
    else:
        queries = config.num_attention_heads * config.head_dim
        yield 2 * queries + 2 * config.num_key_value_heads * config.head_dim, width
        yield width, queries


def _mlp(config: ModelConfig, layer: int) -> Iterator[tuple[int, int]]:
    width, inner = config.hidden_size, config.intermediate_size
    if config.is_moe(layer):
        inner = config.shared_expert_intermediate_size
        yield config.num_experts + 1, width
    yield from ((inner, width), (inner, width), (width, inner))
