"""The whole network with its MTP layer. Parameters have the names and shapes of the checkpoint, but for packed experts.

Shapes: B sequences, T tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from divisi.model.config import ModelConfig
from divisi.model.demo.network.attention import Attention, CosSin, Heads, attend_drafting, rotary_tables
from divisi.model.demo.network.delta import DeltaNet
from divisi.model.demo.network.mixture import Mixture, RouterLoad
from divisi.model.demo.network.norm import Norm, linear

_FINAL = -0.5
"""First weight of the norms before the head, which adds 1: small, lest every token predicts itself to begin with."""


@dataclass(frozen=True, slots=True)
class Pass:
    """What all layers of a forward pass share."""

    cos_sin: CosSin
    counts_BT: Tensor
    """1 for tokens whose routing counts, 0 for padding."""
    load: RouterLoad


class Layer(nn.Module):
    """One decoder layer."""

    def __init__(self, config: ModelConfig, linear: bool) -> None:
        super().__init__()
        self.input_layernorm = Norm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = Norm(config.hidden_size, config.rms_norm_eps)
        if linear:
            self.linear_attn = DeltaNet(config)
        else:
            self.self_attn = Attention(config)
        self.mlp = Mixture(config)
        self.linear = linear

    def forward(self, x: Tensor, context: Pass) -> Tensor:
        """The residual stream after the layer."""
        normed = self.input_layernorm(x)
        mixed = self.linear_attn(normed) if self.linear else self.self_attn(normed, context.cos_sin)
        return self.feed_forward(x + mixed, context)

    def feed_forward(self, x: Tensor, context: Pass) -> Tensor:
        """The experts' half of the layer."""
        added: Tensor = self.mlp(self.post_attention_layernorm(x), context.load, context.counts_BT)
        return x + added


class Mtp(nn.Module):
    """The multi-token prediction layer: fc of embedding and hidden, one attention layer, norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.pre_fc_norm_embedding, self.pre_fc_norm_hidden = Norm(width, eps), Norm(width, eps)
        self.fc = linear(2 * width, width)
        self.layers = nn.ModuleList([Layer(config, linear=False)])
        self.norm = Norm(width, eps)
        nn.init.constant_(self.norm.weight, _FINAL)

    def forward(self, hidden: Tensor, embedded: Tensor, earlier: list[Heads], context: Pass) -> Tensor:
        """One drafting pass; appends its heads to those of the passes before."""
        x = self.fc(torch.cat([self.pre_fc_norm_embedding(embedded), self.pre_fc_norm_hidden(hidden)], dim=-1))
        layer = self.layers[0]
        assert isinstance(layer, Layer)
        heads = layer.self_attn.project(layer.input_layernorm(x), context.cos_sin)
        earlier.append(heads)
        x = x + layer.self_attn.finish(attend_drafting(earlier), heads)
        drafted: Tensor = self.norm(layer.feed_forward(x, context))
        return drafted


class Decoder(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        nn.init.normal_(self.embed_tokens.weight, std=0.3)
        kinds = [kind == "linear_attention" for kind in config.layer_types]
        self.layers = nn.ModuleList([Layer(config, linear) for linear in kinds])
        self.norm = Norm(config.hidden_size, config.rms_norm_eps)
        nn.init.constant_(self.norm.weight, _FINAL)


class Network(nn.Module):
    """The model with its MTP layer; the head is the embedding."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if not config.tie_word_embeddings:
            raise ValueError("the demo network ties its head to the embedding; set tie_word_embeddings")
        self.config = config
        self.model = Decoder(config)
        self.mtp = Mtp(config)

    def context(self, counts_BT: Tensor) -> Pass:
        """A pass over texts that start at their rows' beginnings; `counts_BT` is 1 for text, 0 for padding."""
        return Pass(rotary_tables(self.config, counts_BT.shape[1]), counts_BT, RouterLoad())

    def hidden(self, ids_BT: Tensor, context: Pass) -> Tensor:
        """Final-norm outputs."""
        x: Tensor = self.model.embed_tokens(ids_BT)
        for layer in self.model.layers:
            x = layer(x, context)
        normed: Tensor = self.model.norm(x)
        return normed

    def drafts(self, ids_BT: Tensor, hidden_BTD: Tensor, context: Pass, depth: int) -> list[Tensor]:
        """MTP outputs of `depth` passes: entry i of pass d comes from h_i and token i + d, drafts token i + d + 1."""
        tokens = ids_BT.shape[1] - depth
        earlier: list[Heads] = []
        outs: list[Tensor] = []
        hidden = hidden_BTD[:, :tokens]
        cos, sin = context.cos_sin
        for ahead in range(1, depth + 1):
            at = slice(ahead, ahead + tokens)
            inner = Pass((cos[at], sin[at]), context.counts_BT[:, :tokens], context.load)
            hidden = self.mtp(hidden, self.model.embed_tokens(ids_BT[:, at]), earlier, inner)
            outs.append(hidden)
        return outs

    def head(self, x: Tensor) -> Tensor:
        """Logits."""
        return F.linear(x, self.model.embed_tokens.weight)
