"""Small Qwen3-Next models that between them cover the shapes and switches of the family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

from divisi.model.random_checkpoint import write_random_checkpoint

BASE: dict[str, Any] = {
    "vocab_size": 211, "hidden_size": 48, "num_hidden_layers": 4, "intermediate_size": 64,
    "max_position_embeddings": 512, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4, "num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True,
    "moe_intermediate_size": 24, "shared_expert_intermediate_size": 32, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}  # fmt: skip

# name -> what differs from BASE; `rotary` and `interval` are ours, spelled out below
VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "heads-1to1-interval-2": {"linear_num_key_heads": 4, "interval": 2, "num_key_value_heads": 4},
    "heads-1to4-interval-3": {
        "linear_num_key_heads": 1,
        "interval": 3,
        "num_hidden_layers": 6,
        "num_key_value_heads": 1,
    },
    "top-1": {"num_experts_per_tok": 1},
    "top-10-of-12-unnormalised": {"num_experts": 12, "num_experts_per_tok": 10, "norm_topk_prob": False},
    "dense-mixed-in": {"num_hidden_layers": 6, "mlp_only_layers": [1, 3], "interval": 3},
    "sparse-step-2": {"decoder_sparse_step": 2},
    "tied": {"tie_word_embeddings": True},
    "rotary-half": {"rotary": 0.5},
    "rotary-whole": {"rotary": 1.0},
    "odd-head-dims": {
        "head_dim": 20,
        "linear_key_head_dim": 12,
        "linear_value_head_dim": 20,
        "rotary": 0.5,
        "hidden_size": 56,
    },
    "seven-experts": {"num_experts": 7, "num_experts_per_tok": 3},
    "biased-conv-2": {"attention_bias": True, "linear_conv_kernel_dim": 2, "norm_topk_prob": False},
}

PUBLISHED = "published-layout"
# the spelling of the published checkpoints, with one tensor per expert
PUBLISHED_CONFIG: dict[str, Any] = {
    **BASE, "architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next", "full_attention_interval": 4,
    "num_hidden_layers": 8, "rope_theta": 10000000, "rope_scaling": None, "partial_rotary_factor": 0.25,
    "hidden_act": "silu", "attention_bias": False, "decoder_sparse_step": 1, "mlp_only_layers": [],
    "torch_dtype": "float32",
}  # fmt: skip
ALL = [*VARIANTS, PUBLISHED]


def build_oracle(name: str, seed: int = 0) -> Qwen3NextForCausalLM:
    """A random fp32 model whose routing and logits are decisive enough for exact comparison."""
    fields = {**BASE, **VARIANTS[name]}
    interval, rotary = fields.pop("interval", 4), fields.pop("rotary", 0.25)
    fields["full_attention_interval"] = interval
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": rotary}
    config = Qwen3NextConfig(**fields, rope_parameters=rope, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    model = Qwen3NextForCausalLM(config).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.copy_(_random_like(parameter_name, parameter, generator))
        if config.tie_word_embeddings:
            model.tie_weights()
    return model


def _random_like(name: str, parameter: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    noise = torch.randn(parameter.shape, generator=generator)
    if name.endswith("A_log"):
        return torch.rand(parameter.shape, generator=generator).mul(4).add(0.1).log()
    if name.endswith("dt_bias"):
        return noise - 2
    if parameter.ndim == 1:
        return noise * 0.1 + (1.0 if name.endswith("linear_attn.norm.weight") else 0.0)
    gain = 4.0 if name.endswith(("mlp.gate.weight", "lm_head.weight")) else 1.2
    if name.endswith(("embed_tokens.weight", "conv1d.weight")):
        return noise * 0.5
    return noise * gain * parameter.shape[-1] ** -0.5


def save_oracle(model: Qwen3NextForCausalLM, path: Path) -> Path:
    """Write a folder in transformers' own spelling (config with rope_parameters and layer_types)."""
    model.save_pretrained(path)
    return path


def make_variant(name: str, path: Path) -> Qwen3NextForCausalLM:
    """Write a variant to `path` and return its model; PUBLISHED goes the other way, from our files to the model."""
    if name != PUBLISHED:
        model = build_oracle(name)
        save_oracle(model, path)
        return model
    write_random_checkpoint(path, PUBLISHED_CONFIG, seed=2, tokenizer=False)
    return Qwen3NextForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
