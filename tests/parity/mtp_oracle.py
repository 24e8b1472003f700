"""The MTP layer put together from transformers' own parts, over whole texts: the judge of ours."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM
from transformers.models.qwen3_next.modeling_qwen3_next import (
    Qwen3NextDecoderLayer,
    Qwen3NextRMSNorm,
    Qwen3NextRotaryEmbedding,
    apply_rotary_pos_emb,
)


class Entries(NamedTuple):
    """Keys and values [P, J, D] of positions 1 to P."""

    keys: Tensor
    values: Tensor


class MtpOracle:
    def __init__(self, path: Path) -> None:
        self.model = Qwen3NextForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        config: Qwen3NextConfig = self.model.config
        index = config.layer_types.index("full_attention")
        self.layer = Qwen3NextDecoderLayer(config, index).float().eval()
        width = config.hidden_size
        self.norms = {
            name: Qwen3NextRMSNorm(width, eps=config.rms_norm_eps)
            for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")
        }
        self.rotary = Qwen3NextRotaryEmbedding(config)
        tensors = {name: tensor.float() for name, tensor in load_file(path / "model.safetensors").items()}
        self.fc = tensors["mtp.fc.weight"]
        own = {name[len("mtp.layers.0.") :]: t for name, t in tensors.items() if name.startswith("mtp.layers.0.")}
        self.layer.load_state_dict(_packed(own, config.num_experts))
        for name, norm in self.norms.items():
            norm.load_state_dict({"weight": tensors[f"mtp.{name}.weight"]})

    @torch.no_grad()
    def hidden(self, tokens: list[int]) -> Tensor:
        """h [T, D]: the model's final-norm outputs."""
        found: Tensor = self.model.model(torch.tensor([tokens])).last_hidden_state[0]
        return found

    @torch.no_grad()
    def drafts(self, tokens: list[int], h: Tensor) -> tuple[Tensor, Tensor, Entries]:
        """Logits [P, V], the normed outputs and the entries of positions 1 to P, from h [P, D] of those before."""
        embedded = self.model.model.embed_tokens(torch.tensor(tokens[1:]))
        parts = [self.norms["pre_fc_norm_embedding"](embedded), self.norms["pre_fc_norm_hidden"](h)]
        x = torch.nn.functional.linear(torch.cat(parts, -1), self.fc)[None]
        positions = torch.arange(1, len(tokens))[None]
        cos_sin = self.rotary(x, positions)
        count = len(tokens) - 1
        mask = torch.full((count, count), -torch.inf).triu(1)[None, None]
        attention = self.layer.self_attn
        normed = self.layer.input_layernorm(x)
        keys = attention.k_norm(attention.k_proj(normed).view(1, count, -1, attention.head_dim)).transpose(1, 2)
        values = attention.v_proj(normed).view(count, -1, attention.head_dim)
        entries = Entries(apply_rotary_pos_emb(keys, keys, *cos_sin)[1][0].transpose(0, 1), values)
        out = self.layer(x, position_embeddings=cos_sin, attention_mask=mask)
        out = self.norms["norm"](out[0] if isinstance(out, tuple) else out)[0]
        return self.model.lm_head(out), out, entries

    def draft_ahead(self, tokens: list[int], more: list[int]) -> list[Tensor]:
        """Logits after `tokens`, whose h are the model's, and after each of `more`, whose h the pass before gave."""
        h = self.hidden(tokens[:-1])
        found = []
        for ahead in range(len(more) + 1):
            logits, out, _ = self.drafts([*tokens, *more[:ahead]], h)
            found.append(logits[-1])
            h = torch.cat([h, out[-1:]])
        return found


def _packed(tensors: dict[str, Tensor], experts: int) -> dict[str, Tensor]:
    """Experts as transformers holds them."""
    if "mlp.experts.gate_up_proj" in tensors or not experts:
        return tensors
    rest = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    parts = ("gate", "up", "down")
    own = [{part: tensors[f"mlp.experts.{e}.{part}_proj.weight"] for part in parts} for e in range(experts)]
    rest["mlp.experts.gate_up_proj"] = torch.stack([torch.cat([one["gate"], one["up"]]) for one in own])
    rest["mlp.experts.down_proj"] = torch.stack([one["down"] for one in own])
    return rest
