"""Seeded random checkpoints with a tokenizer, in the published file format: for tests, demos and load runs.

Scales are chosen so that logits and routing are decisive: with the usual small initialisation a rounding error
decides the next token, and a comparison of two engines would say nothing.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from divisi.model.checkpoint.layout import ExpertLayout, Shape, expert_shapes, main_shapes, packed_shapes
from divisi.model.config import ModelConfig
from divisi.model.config.tensor_names import INDEX_FILE, SINGLE_FILE
from divisi.model.random_checkpoint.tokenizer import END_OF_TEXT, END_OF_TURN, write_random_tokenizer

_Draw = Callable[[Shape, torch.Generator], Tensor]

SMALL_CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3NextForCausalLM"],
    "model_type": "qwen3_next",
    "vocab_size": 1280,
    "hidden_size": 96,
    "num_hidden_layers": 8,
    "full_attention_interval": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "partial_rotary_factor": 0.25,
    "rope_theta": 10000000,
    "rope_scaling": None,
    "attention_bias": False,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 48,
    "intermediate_size": 192,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "max_position_embeddings": 8192,
    "torch_dtype": "bfloat16",
}
"""A model of about 5 MB with every kind of layer; used where no config is given."""


def write_random_checkpoint(
    out: str | Path,
    config_json: Mapping[str, Any] | None = None,
    seed: int = 0,
    layout: ExpertLayout = "published",
    *,
    tokenizer: bool = True,
    max_file_bytes: int = 2**31,
    mtp: bool = False,
    mtp_layout: ExpertLayout | None = None,
) -> ModelConfig:
    """Write config, weights, tokenizer and generation config to the directory `out`; return the model's config.

    The weights depend on the seed and on tensor names only, so that both expert layouts and any split over
    files hold the same model. Above `max_file_bytes` the weights go to several files with an index. `mtp` adds an MTP
    layer, whose experts are in `mtp_layout`, or in that of the rest.
    With a tokenizer, the config's special token ids are set to its own. Raises ConfigError.
    """
    config_json = dict(SMALL_CONFIG if config_json is None else config_json)
    config = ModelConfig.from_hf(config_json, int(mtp))
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    if tokenizer:
        ids = write_random_tokenizer(out, config.vocab_size, config.max_position_embeddings)
        config_json |= {"bos_token_id": None, "eos_token_id": ids[END_OF_TURN], "pad_token_id": ids[END_OF_TEXT]}
        stops = {"eos_token_id": [ids[END_OF_TURN], ids[END_OF_TEXT]], "pad_token_id": ids[END_OF_TEXT]}
        _write_json(out / "generation_config.json", stops)
    _write_json(out / "config.json", config_json)
    shapes = _all_shapes(config, layout, mtp_layout or layout)
    _write_weights(out, config, seed, shapes, max_file_bytes)
    return config


def _write_weights(
    out: Path, config: ModelConfig, seed: int, shapes: Mapping[str, Shape], max_file_bytes: int
) -> None:
    dtype = getattr(torch, config.dtype)
    files = _split(shapes, dtype.itemsize, max_file_bytes)
    if len(files) == 1:
        names = [SINGLE_FILE]
    else:
        names = [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
        weight_map = {name: file for file, part in zip(names, files, strict=True) for name in part}
        total = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
        _write_json(out / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
    for file, part in zip(names, files, strict=True):
        tensors = {name: _tensor(name, shapes[name], config, seed).to(dtype) for name in part}
        save_file(tensors, out / file, metadata={"format": "pt"})


def _all_shapes(config: ModelConfig, layout: ExpertLayout, mtp_layout: ExpertLayout) -> dict[str, Shape]:
    shapes = main_shapes(config)
    for layer in (*config.moe_layers, *config.draft_moe_layers):
        if (mtp_layout if layer == config.mtp_index else layout) == "packed":
            shapes |= packed_shapes(config, layer)
        else:
            for expert in range(config.num_experts):
                shapes |= expert_shapes(config, layer, expert)
    return shapes


def _split(shapes: Mapping[str, Shape], itemsize: int, max_file_bytes: int) -> list[list[str]]:
    files: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        num_bytes = math.prod(shape) * itemsize
        if files[-1] and size + num_bytes > max_file_bytes:
            files.append([])
            size = 0
        files[-1].append(name)
        size += num_bytes
    return files


def _tensor(name: str, shape: Shape, config: ModelConfig, seed: int) -> Tensor:
    """Draw one tensor in fp32; a packed one is put together from its experts' own."""
    if name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
        return torch.stack([_packed_expert(name, expert, config, seed) for expert in range(shape[0])])
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
    return _distribution(name, config)(shape, generator)


def _packed_expert(name: str, expert: int, config: ModelConfig, seed: int) -> Tensor:
    layer = config.mtp_index if name.startswith("mtp.") else int(name.split(".")[2])
    parts = list(expert_shapes(config, layer, expert).items())
    wanted = parts[:2] if name.endswith("gate_up_proj") else parts[2:]
    return torch.cat([_tensor(part, shape, config, seed) for part, shape in wanted])


def _distribution(name: str, config: ModelConfig) -> _Draw:
    head = 3.0 / math.sqrt(config.hidden_size)  # logits of standard deviation 3
    if name == "model.embed_tokens.weight":
        return _normal(head if config.tie_word_embeddings else 1.0)
    if name == "lm_head.weight":
        return _normal(head)
    if name.endswith("A_log"):
        return lambda shape, g: torch.empty(shape).uniform_(0.1, 8.0, generator=g).log_()
    if name.endswith("dt_bias"):
        return lambda shape, g: torch.empty(shape).uniform_(-5.0, -1.0, generator=g)
    if name.endswith("conv1d.weight"):
        return _normal(0.5)
    if name.endswith("linear_attn.norm.weight"):  # the only norm whose weight is not centred on zero
        return lambda shape, g: 1.0 + 0.1 * torch.randn(shape, generator=g)
    if name.endswith(("norm.weight", ".bias")) or ".pre_fc_norm_" in name:
        return _normal(0.1)
    gain = 2.0 if name.endswith("mlp.gate.weight") else 1.5 if ".experts." in name else 1.2
    return lambda shape, g: torch.randn(shape, generator=g) * (gain / math.sqrt(shape[-1]))


def _normal(scale: float) -> _Draw:
    return lambda shape, g: torch.randn(shape, generator=g) * scale


def _write_json(path: Path, data: object) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
