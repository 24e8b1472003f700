"""Names and shapes of the tensors of `Qwen3NextForCausalLM` and its MTP layer, as published."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from divisi.model.config import ModelConfig

Shape = tuple[int, ...]
ExpertLayout = Literal["published", "packed"]
EXPERT_PARTS = ("gate_proj", "up_proj", "down_proj")


def main_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Every tensor but the routed experts': what an attention worker holds. With the MTP layer's, where it is used."""
    hidden = config.hidden_size
    shapes: dict[str, Shape] = {
        "model.embed_tokens.weight": (config.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    for layer, kind in enumerate(config.layer_types):
        shapes |= _layer(config, layer, _full_attention if kind == "full_attention" else _linear_attention)
    if config.mtp_layers:
        norms = ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")
        shapes |= {f"mtp.{name}.weight": (hidden,) for name in norms}
        shapes |= {"mtp.fc.weight": (hidden, 2 * hidden)} | _layer(config, config.mtp_index, _full_attention)
    return shapes


def layer_prefix(config: ModelConfig, layer: int) -> str:
    """What the names of a layer's tensors begin with; the layer after the last is the MTP layer."""
    return "mtp.layers.0" if layer == config.mtp_index else f"model.layers.{layer}"


def expert_shapes(config: ModelConfig, layer: int, expert: int) -> dict[str, Shape]:
    """One routed expert of one layer, a tensor per projection."""
    hidden, inner = config.hidden_size, config.moe_intermediate_size
    prefix = f"{layer_prefix(config, layer)}.mlp.experts.{expert}"
    gate, up, down = (f"{prefix}.{part}.weight" for part in EXPERT_PARTS)
    return {gate: (inner, hidden), up: (inner, hidden), down: (hidden, inner)}


def packed_shapes(config: ModelConfig, layer: int) -> dict[str, Shape]:
    """All routed experts of one layer in two tensors; in `gate_up_proj` the gate's rows come first."""
    experts, hidden, inner = config.num_experts, config.hidden_size, config.moe_intermediate_size
    prefix = f"{layer_prefix(config, layer)}.mlp.experts"
    return {f"{prefix}.gate_up_proj": (experts, 2 * inner, hidden), f"{prefix}.down_proj": (experts, hidden, inner)}


def belongs_to_main_model(name: str) -> bool:
    """Whether a tensor's name says that the main model uses it (buffers of old exports are no weights)."""
    return name.startswith(("model.", "lm_head.")) and not name.endswith(".inv_freq")


def _layer(config: ModelConfig, layer: int, mixer: Callable[[ModelConfig], dict[str, Shape]]) -> dict[str, Shape]:
    hidden, prefix = config.hidden_size, layer_prefix(config, layer)
    ffn = _moe(config) if config.is_moe(layer) else _mlp("mlp.", hidden, config.intermediate_size)
    norms: dict[str, Shape] = {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
    return {f"{prefix}.{name}": shape for name, shape in (norms | mixer(config) | ffn).items()}


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
