"""Names and shapes of the tensors of `Qwen3NextForCausalLM`, as published."""

from __future__ import annotations

from typing import Literal

from divisi.model.config import ModelConfig

Shape = tuple[int, ...]
ExpertLayout = Literal["published", "packed"]
EXPERT_PARTS = ("gate_proj", "up_proj", "down_proj")


def main_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Every tensor of the main model but the routed experts': what an attention worker holds."""
    hidden = config.hidden_size
    shapes: dict[str, Shape] = {
        "model.embed_tokens.weight": (config.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    for layer, kind in enumerate(config.layer_types):
        prefix = f"model.layers.{layer}."
        mixer = _full_attention(config) if kind == "full_attention" else _linear_attention(config)
        ffn = _moe(config) if config.is_moe(layer) else _mlp("mlp.", hidden, config.intermediate_size)
        norms: dict[str, Shape] = {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
        shapes |= {prefix + name: shape for name, shape in (norms | mixer | ffn).items()}
    return shapes


def expert_shapes(config: ModelConfig, layer: int, expert: int) -> dict[str, Shape]:
    """One routed expert of one layer, a tensor per projection."""
    hidden, inner = config.hidden_size, config.moe_intermediate_size
    gate, up, down = (expert_name(layer, expert, part) for part in EXPERT_PARTS)
    return {gate: (inner, hidden), up: (inner, hidden), down: (hidden, inner)}


def packed_shapes(config: ModelConfig, layer: int) -> dict[str, Shape]:
    """All routed experts of one layer in two tensors; in `gate_up_proj` the gate's rows come first."""
    experts, hidden, inner = config.num_experts, config.hidden_size, config.moe_intermediate_size
    return {
        packed_name(layer, "gate_up_proj"): (experts, 2 * inner, hidden),
        packed_name(layer, "down_proj"): (experts, hidden, inner),
    }


def expert_name(layer: int, expert: int, part: str) -> str:
    """Name of an expert's projection in the published layout."""
    return f"model.layers.{layer}.mlp.experts.{expert}.{part}.weight"


def packed_name(layer: int, part: str) -> str:
    """Name of a layer's packed projections."""
    return f"model.layers.{layer}.mlp.experts.{part}"


def belongs_to_main_model(name: str) -> bool:
    """Whether a tensor's name says that the main model uses it (buffers of old exports are no weights)."""
    return name.startswith(("model.", "lm_head.")) and not name.endswith(".inv_freq")


def _full_attention(config: ModelConfig) -> dict[str, Shape]:
    hidden, head = config.hidden_size, config.head_dim
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    # q_proj holds, head by head, the query's rows and then the output gate's
    rows = {"q_proj": (2 * queries, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden)}
    rows["o_proj"] = (hidden, queries)
    shapes: dict[str, Shape] = {f"self_attn.{name}.weight": shape for name, shape in rows.items()}
    if config.attention_bias:
        shapes |= {f"self_attn.{name}.bias": (shape[0],) for name, shape in rows.items()}
    return shapes | {"self_attn.q_norm.weight": (head,), "self_attn.k_norm.weight": (head,)}


def _linear_attention(config: ModelConfig) -> dict[str, Shape]:
    hidden, heads = config.hidden_size, config.linear_num_value_heads
    values = heads * config.linear_value_head_dim
    return {
        "linear_attn.in_proj_qkvz.weight": (config.conv_dim + values, hidden),
        "linear_attn.in_proj_ba.weight": (2 * heads, hidden),
        "linear_attn.conv1d.weight": (config.conv_dim, 1, config.linear_conv_kernel_dim),
        "linear_attn.dt_bias": (heads,),
        "linear_attn.A_log": (heads,),
        "linear_attn.norm.weight": (config.linear_value_head_dim,),
        "linear_attn.out_proj.weight": (hidden, values),
    }


def _moe(config: ModelConfig) -> dict[str, Shape]:
    hidden = config.hidden_size
    router: dict[str, Shape] = {"mlp.gate.weight": (config.num_experts, hidden)}
    shared = _mlp("mlp.shared_expert.", hidden, config.shared_expert_intermediate_size)
    return router | shared | {"mlp.shared_expert_gate.weight": (1, hidden)}


def _mlp(prefix: str, hidden: int, inner: int) -> dict[str, Shape]:
    return {
        f"{prefix}gate_proj.weight": (inner, hidden),
        f"{prefix}up_proj.weight": (inner, hidden),
        f"{prefix}down_proj.weight": (hidden, inner),
    }
