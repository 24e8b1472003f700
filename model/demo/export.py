"""From trained parameters to a checkpoint folder as published, and back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from divisi.model.checkpoint.layout import EXPERT_PARTS
from divisi.model.config import ModelConfig
from divisi.model.config.tensor_names import SINGLE_FILE
from divisi.model.demo.network import Network
from divisi.model.demo.tokenizer import END_OF_TEXT, END_OF_TURN

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3NextForCausalLM"],
    "model_type": "qwen3_next",
    "vocab_size": 768,
    "hidden_size": 128,
    "num_hidden_layers": 8,
    "full_attention_interval": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "partial_rotary_factor": 0.25,
    "rope_theta": 10000,
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
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 64,
    "intermediate_size": 256,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "max_position_embeddings": 32768,
    "mtp_num_hidden_layers": 1,
    "torch_dtype": "bfloat16",
}
"""The demo model's shape."""

NARROW = {"num_attention_heads": 4, "num_key_value_heads": 2}
"""What it begins with in place of its heads."""


def write_checkpoint(parameters: Mapping[str, Tensor], out: Path) -> None:
    """Write config, generation config and bf16 weights; the tokenizer is in the folder already."""
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    end, pad = tokenizer.token_to_id(END_OF_TURN), tokenizer.token_to_id(END_OF_TEXT)
    shape = CONFIG | _heads(parameters)
    _write_json(out / "config.json", shape | {"bos_token_id": None, "eos_token_id": end, "pad_token_id": pad})
    stops = {"do_sample": False, "eos_token_id": [end, pad], "pad_token_id": pad}
    _write_json(out / "generation_config.json", stops)
    tensors = published(parameters, CONFIG["num_experts"], CONFIG["moe_intermediate_size"])
    half = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in tensors.items()}
    unfinished = out / f"{SINGLE_FILE}.part"
    save_file(half, unfinished, metadata={"format": "pt"})
    unfinished.replace(out / SINGLE_FILE)  # never a broken one in its place


def _heads(parameters: Mapping[str, Tensor]) -> dict[str, int]:
    """How many heads weights are of, which training doubles at some point."""
    attention, dim = "mtp.layers.0.self_attn", CONFIG["head_dim"]
    queries, keys = (parameters[f"{attention}.{part}.weight"] for part in ("o_proj", "k_proj"))
    return {"num_attention_heads": queries.shape[1] // dim, "num_key_value_heads": keys.shape[0] // dim}


def average_weights(folders: Sequence[Path], out: Path) -> None:
    """Write the mean of some checkpoints' weights to `out`, which may be one of them, but the MTP layer of the last.

    Raises KeyError where they are not of one shape of network.
    """
    networks = [read_network(folder).state_dict() for folder in folders]
    mean = {
        name: last if name.startswith("mtp.") else torch.stack([network[name] for network in networks]).mean(0)
        for name, last in networks[-1].items()
    }
    write_checkpoint(mean, out)


def read_network(folder: Path) -> Network:
    """The trainable network with a checkpoint's weights."""
    network = Network(ModelConfig.load(folder))
    with safe_open(folder / SINGLE_FILE, framework="pt") as file:
        tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 - no mapping
    network.load_state_dict(packed(tensors, network.config.num_experts))
    return network


def published(parameters: Mapping[str, Tensor], experts: int, inner: int) -> dict[str, Tensor]:
    """Packed experts as one tensor per projection, the rest as it is."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in parameters.items():
        prefix, _, last = name.rpartition(".")
        if last == "gate_up_DF":
            rows = tensor.T.reshape(experts, 2, inner, -1)
            for expert in range(experts):
                tensors[f"{prefix}.{expert}.gate_proj.weight"] = rows[expert, 0]
                tensors[f"{prefix}.{expert}.up_proj.weight"] = rows[expert, 1]
        elif last == "down_FD":
            for expert, rows in enumerate(tensor.view(experts, inner, -1)):
                tensors[f"{prefix}.{expert}.down_proj.weight"] = rows.T
        else:
            tensors[name] = tensor
    return {name: tensor.clone() for name, tensor in tensors.items()}


def packed(tensors: Mapping[str, Tensor], experts: int) -> dict[str, Tensor]:
    """The reverse of `published`."""
    parameters = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    prefixes = {name.split(".experts.")[0] + ".experts" for name in tensors if ".experts." in name}
    for prefix in prefixes:
        gate, up, down = (
            torch.stack([tensors[f"{prefix}.{expert}.{part}.weight"] for expert in range(experts)])
            for part in EXPERT_PARTS
        )
        parameters[f"{prefix}.gate_up_DF"] = torch.stack([gate, up], 1).flatten(0, 2).T.contiguous()
        parameters[f"{prefix}.down_FD"] = down.mT.flatten(0, 1).contiguous()
    return parameters


def _write_json(path: Path, data: object) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
