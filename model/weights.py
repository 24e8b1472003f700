"""The attention side's weights in the shapes the layers use: projections fused, heads grouped by kind.

Shapes: D model width, P projected row, V vocabulary, E experts, F 2 x inner width, I inner width, X mixer output width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from divisi.kernels.attention.layout import QkNorm
from divisi.kernels.gated_delta.layout import DeltaWeights
from divisi.kernels.linear.layout import Matrix
from divisi.kernels.mixture.layout import MixtureMatrices
from divisi.kernels.native.memory import return_freed_memory
from divisi.kernels.select import Kernels
from divisi.model.checkpoint import Checkpoint
from divisi.model.checkpoint.layout import layer_prefix
from divisi.model.config import ModelConfig

Progress = Callable[[int], None]
"""Called with the bytes read so far."""


@dataclass(frozen=True, slots=True)
class AttentionWeights:
    """A row is ``[q | gate | k | v]``, each with its heads side by side."""

    rows_PD: Matrix
    rows_bias_P: Tensor | None
    norm: QkNorm
    out_DX: Matrix
    out_bias_D: Tensor | None


@dataclass(frozen=True, slots=True)
class DeltaNetWeights:
    """A row is ``[q | k | v | z | b | a]``, each with its heads side by side."""

    rows_PD: Matrix
    delta: DeltaWeights
    out_DX: Matrix


@dataclass(frozen=True, slots=True)
class MlpWeights:
    """SwiGLU: the gate's rows, then up's."""

    gate_up_FD: Matrix
    down_DI: Matrix


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer; norm weights are whole factors, fp32."""

    input_scale_D: Tensor
    mixer: AttentionWeights | DeltaNetWeights
    mlp_scale_D: Tensor
    mlp: MlpWeights | MixtureMatrices
    """A mixture's routed experts live in an ExpertBank."""


@dataclass(frozen=True, slots=True)
class MtpWeights:
    """The MTP layer. Its head and its embedding are the model's."""

    embedding_scale_D: Tensor
    hidden_scale_D: Tensor
    fc_DE: Matrix
    """E = 2 * D: an input is ``[embedding | hidden]``."""
    layer: LayerWeights
    kv_rows_PD: Matrix
    """The layer's keys and values alone, once more: entries are written without queries."""
    kv_rows_bias_P: Tensor | None
    final_scale_D: Tensor


@dataclass(frozen=True, slots=True)
class Weights:
    """The model but for its routed experts. ``head_VD`` is ``embed_VD`` itself where they are tied.

    Matrices are laid out as the kernels that take them want it.
    """

    embed_VD: Matrix
    layers: tuple[LayerWeights, ...]
    final_scale_D: Tensor
    head_VD: Matrix
    mtp: MtpWeights | None = None


def load_weights(
    checkpoint: Checkpoint,
    config: ModelConfig,
    kernels: Kernels,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress | None = None,
) -> Weights:
    """Read everything but the routed experts. Raises CheckpointError naming the tensor that is missing or misshapen."""
    weights = _Loader(checkpoint, config, kernels, dtype, device, progress).weights()
    return_freed_memory()
    return weights


class _Loader:
    def __init__(
        self,
        checkpoint: Checkpoint,
        config: ModelConfig,
        kernels: Kernels,
        dtype: torch.dtype,
        device: torch.device,
        progress: Progress | None,
    ) -> None:
        self._kernels, self._pack = kernels, kernels.pack_linear
        self._checkpoint, self._config, self._dtype, self._device = checkpoint, config, dtype, device
        self._progress = progress

    def weights(self) -> Weights:
        config = self._config
        shape = (config.vocab_size, config.hidden_size)
        tied, rows_VD = config.tie_word_embeddings, self._read("model.embed_tokens.weight", shape)
        embed_VD = self._pack(rows_VD) if tied else rows_VD
        layers = tuple(self._layer(index) for index in range(config.num_hidden_layers))
        final_scale_D = self._scale("model.norm.weight", config.hidden_size)
        head_VD = embed_VD if tied else self._pack(self._read("lm_head.weight", shape))
        mtp = self._mtp() if config.mtp_layers else None
        return Weights(embed_VD, layers, final_scale_D, head_VD, mtp)

    def _mtp(self) -> MtpWeights:
        width = self._config.hidden_size
        norms = ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")
        embedding, hidden, final = (self._scale(f"mtp.{name}.weight", width) for name in norms)
        fc_DE = self._pack(self._read("mtp.fc.weight", (width, 2 * width)))
        layer = self._layer(self._config.mtp_index)
        assert isinstance(layer.mixer, AttentionWeights), "the MTP layer is one of full attention"
        kv = self._key_values(f"{layer_prefix(self._config, self._config.mtp_index)}.self_attn")
        bias_P = layer.mixer.rows_bias_P
        if bias_P is not None:
            bias_P = bias_P[-sum(len(rows) for rows in kv) :]
        return MtpWeights(embedding, hidden, fc_DE, layer, self._pack(torch.cat(kv)), bias_P, final)

    def _layer(self, index: int) -> LayerWeights:
        prefix, width = layer_prefix(self._config, index), self._config.hidden_size
        linear = index in self._config.linear_layers
        return LayerWeights(
            self._scale(f"{prefix}.input_layernorm.weight", width),
            self._delta_net(f"{prefix}.linear_attn") if linear else self._attention(f"{prefix}.self_attn"),
            self._scale(f"{prefix}.post_attention_layernorm.weight", width),
            self._moe(f"{prefix}.mlp")
            if self._config.is_moe(index)
            else MlpWeights(*self._kernels.pack_mlp(*self._mlp(f"{prefix}.mlp", self._config.intermediate_size))),
        )

    def _attention(self, prefix: str) -> AttentionWeights:
        c = self._config
        heads, kv, dim = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        q_name, out = f"{prefix}.q_proj", f"{prefix}.o_proj"
        q = self._split_query_gate(self._read(f"{q_name}.weight", (heads * 2 * dim, c.hidden_size)))
        rows_bias_P = out_bias_D = None
        if c.attention_bias:
            q_bias = self._split_query_gate(self._read(f"{q_name}.bias", (heads * 2 * dim,)))
            kv_bias = [self._read(f"{prefix}.{name}_proj.bias", (kv * dim,)) for name in "kv"]
            rows_bias_P = torch.cat([q_bias, *kv_bias])
            out_bias_D = self._read(f"{out}.bias", (c.hidden_size,))
        norm = QkNorm(
            self._scale(f"{prefix}.q_norm.weight", dim), self._scale(f"{prefix}.k_norm.weight", dim), c.rms_norm_eps
        )
        rows_PD = self._pack(torch.cat([q, *self._key_values(prefix)]))
        out_DX = self._pack(self._read(f"{out}.weight", (c.hidden_size, heads * dim)))
        return AttentionWeights(rows_PD, rows_bias_P, norm, out_DX, out_bias_D)

    def _key_values(self, prefix: str) -> list[Tensor]:
        shape = (self._config.num_key_value_heads * self._config.head_dim, self._config.hidden_size)
        return [self._read(f"{prefix}.{name}_proj.weight", shape) for name in "kv"]

    def _split_query_gate(self, rows: Tensor) -> Tensor:
        """``[q | gate]`` per head in the checkpoint; here all q, then all gates."""
        per_head = rows.view(self._config.num_attention_heads, 2, self._config.head_dim, *rows.shape[1:])
        return per_head.transpose(0, 1).flatten(0, 2)

    def _delta_net(self, prefix: str) -> DeltaNetWeights:
        c = self._config
        groups, heads = c.linear_num_key_heads, c.linear_num_value_heads
        key_dim, per_group = c.linear_key_head_dim, heads // groups
        value_rows = per_group * c.linear_value_head_dim
        sizes = [key_dim, key_dim, value_rows, value_rows]
        qkvz = self._grouped(f"{prefix}.in_proj_qkvz.weight", groups, sizes)
        ba = self._grouped(f"{prefix}.in_proj_ba.weight", groups, [per_group, per_group])
        taps = c.linear_conv_kernel_dim
        conv_WC = self._read(f"{prefix}.conv1d.weight", (c.conv_dim, 1, taps), torch.float32)[:, 0].T.contiguous()
        delta = DeltaWeights(
            conv_WC,
            -self._read(f"{prefix}.A_log", (heads,), torch.float32).exp(),
            self._read(f"{prefix}.dt_bias", (heads,), torch.float32),
            self._read(f"{prefix}.norm.weight", (c.linear_value_head_dim,), torch.float32),
            c.rms_norm_eps,
        )
        out_DX = self._read(f"{prefix}.out_proj.weight", (c.hidden_size, heads * c.linear_value_head_dim))
        return DeltaNetWeights(self._pack(torch.cat([*qkvz, *ba])), delta, self._pack(out_DX))

    def _grouped(self, name: str, groups: int, sizes: list[int]) -> list[Tensor]:
        """Split rows that the checkpoint interleaves by key head into one block per kind."""
        rows = self._read(name, (groups * sum(sizes), self._config.hidden_size))
        return [part.flatten(0, 1) for part in rows.view(groups, sum(sizes), -1).split(sizes, dim=1)]

    def _moe(self, prefix: str) -> MixtureMatrices:
        c = self._config
        router = self._read(f"{prefix}.gate.weight", (c.num_experts, c.hidden_size))
        gate = self._read(f"{prefix}.shared_expert_gate.weight", (1, c.hidden_size))
        shared = self._mlp(f"{prefix}.shared_expert", c.shared_expert_intermediate_size)
        return self._kernels.mixture.pack(router, gate[0], *shared)

    def _mlp(self, prefix: str, inner: int) -> tuple[Tensor, Tensor]:
        width = self._config.hidden_size
        gate, up = (self._read(f"{prefix}.{name}_proj.weight", (inner, width)) for name in ("gate", "up"))
        return torch.cat([gate, up]), self._read(f"{prefix}.down_proj.weight", (width, inner))

    def _scale(self, name: str, width: int) -> Tensor:
        """A zero-centred norm weight as the factor it stands for."""
        return self._read(name, (width,), torch.float32) + 1.0

    def _read(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        tensor = self._checkpoint.read(name, shape, dtype or self._dtype).to(self._device)
        if self._progress is not None:
            self._progress(self._checkpoint.bytes_read)
        return tensor
