"""What a step's intermediate values take on a CPU, and the table of rotations: memory besides weights, KV and state.

T rows of a step, R rows with logits.
"""

from __future__ import annotations

from divisi.model.config import ModelConfig
from divisi.model.placement import Role

_FP32, _BF16 = 4, 2


def rotation_bytes(config: ModelConfig, num_positions: int) -> int:
    """Of a cosine and a sine for each pair of rotary dims at each position."""
    return _FP32 * num_positions * config.rotary_dim


def scratch_bytes(config: ModelConfig, role: Role, rows: int, logit_rows: int, *, packed: bool) -> int:
    """The most that a step of T `rows` holds at once, `logit_rows` of them with logits; about, not to the byte.

    Some of it stays with the thread that computes, as the memory of the C++ kernels, the rest comes and goes. `packed`:
    weights are, and what meets them is rounded to bf16.
    """
    width, chosen = config.hidden_size, config.num_experts_per_tok
    rounded = _BF16 * width if packed else 0
    total = 0
    if role.attention:
        streams = 5 * width  # residual, the mixer's output, its norm, the shared expert's output, the sum
        total = rows * (_FP32 * (streams + _widest_layer(config)) + rounded)
        total += logit_rows * _FP32 * config.vocab_size
    if role.experts:
        inner = config.moe_intermediate_size
        each = _BF16 * inner if packed else _FP32 * (inner + width)  # of a row and one of its experts
        total += rows * (chosen * each + _FP32 * 2 * width + rounded)
    return total


def _widest_layer(config: ModelConfig) -> int:
    """Values a row that a mixer or a dense layer holds at once: projections, what is made of them, outputs."""
    widths = [0]
    if config.linear_layers:
        values = config.linear_num_value_heads * config.linear_value_head_dim
        widths.append(2 * (config.conv_dim + values) + 2 * config.linear_num_value_heads)
    if config.full_layers or config.mtp_layers:
        queries = config.num_attention_heads * config.head_dim
        widths.append(4 * queries + 2 * config.num_key_value_heads * config.head_dim)
    if len(config.moe_layers) < config.num_hidden_layers:
        widths.append(3 * config.intermediate_size)
    return max(widths)
