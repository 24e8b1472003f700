"""The model's shape, read from a Hugging Face `config.json`. Imports no torch.

Two spellings are in use and both are read: that of the published checkpoints (`rope_theta`,
`partial_rotary_factor`, `rope_scaling`, `full_attention_interval`) and that of transformers 5
(`rope_parameters`, `layer_types`). Defaults are those of transformers' `Qwen3NextConfig`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt, ValidationError, model_validator

from divisi.model.config.hf_config import normalise
from divisi.model.config.tensor_names import count_mtp_layers
from divisi.model.errors import ConfigError

LayerType = Literal["linear_attention", "full_attention"]
DType = Literal["bfloat16", "float32", "float16"]

DTYPE_BYTES: Mapping[DType, int] = {"bfloat16": 2, "float16": 2, "float32": 4}
"""Bytes of one number."""


class ModelConfig(BaseModel):
    """Everything that the layers, the caches and the checkpoint reader need to know; immutable."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    vocab_size: PositiveInt
    hidden_size: PositiveInt
    num_hidden_layers: PositiveInt
    layer_types: tuple[LayerType, ...]

    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt
    head_dim: PositiveInt
    rotary_dim: PositiveInt
    """Leading channels of a head that are rotated; the rest carry no position."""
    rope_theta: PositiveFloat
    attention_bias: bool

    linear_num_key_heads: PositiveInt
    linear_num_value_heads: PositiveInt
    linear_key_head_dim: PositiveInt
    linear_value_head_dim: PositiveInt
    linear_conv_kernel_dim: PositiveInt

    num_experts: int
    num_experts_per_tok: PositiveInt
    norm_topk_prob: bool
    moe_intermediate_size: PositiveInt
    shared_expert_intermediate_size: PositiveInt
    intermediate_size: PositiveInt
    """Width of the dense MLP in layers without experts."""
    moe_layers: tuple[int, ...]

    rms_norm_eps: PositiveFloat
    tie_word_embeddings: bool
    max_position_embeddings: PositiveInt
    hidden_act: Literal["silu"]
    dtype: DType

    mtp_layers: int = 0
    """Multi-token prediction layers beside the model's own, found by their tensors; 0 also where they are not used."""

    @property
    def linear_layers(self) -> tuple[int, ...]:
        """Indices of the Gated DeltaNet layers."""
        return tuple(i for i, kind in enumerate(self.layer_types) if kind == "linear_attention")

    @property
    def full_layers(self) -> tuple[int, ...]:
        """Indices of the full-attention layers."""
        return tuple(i for i, kind in enumerate(self.layer_types) if kind == "full_attention")

    @property
    def conv_dim(self) -> int:
        """Channels of a linear layer's convolution: its q, k and v side by side."""
        keys = self.linear_num_key_heads * self.linear_key_head_dim
        return 2 * keys + self.linear_num_value_heads * self.linear_value_head_dim

    @property
    def kv_values_per_token(self) -> int:
        """Numbers that one token leaves in the KV pages: its k and v in every layer with attention."""
        return 2 * self.num_key_value_heads * self.head_dim * (len(self.full_layers) + self.mtp_layers)

    @property
    def mtp_index(self) -> int:
        """What the MTP layer counts as among the layers: the one after the last."""
        return self.num_hidden_layers

    @property
    def draft_moe_layers(self) -> tuple[int, ...]:
        """Layers with routed experts that a draft goes through: the MTP layer, if it has any."""
        return (self.mtp_index,) if self.mtp_layers and self.num_experts else ()

    def is_moe(self, layer: int) -> bool:
        """Whether the layer's feed-forward part is a mixture of experts."""
        return layer in self.moe_layers or layer in self.draft_moe_layers

    def with_mtp(self, wanted: bool) -> ModelConfig:
        """The model with its MTP layer in use, or without. Raises ConfigError where it has more than one."""
        if wanted and self.mtp_layers > 1:
            remedy = "more than one MTP layer is not supported; turn multi-token prediction off (0 draft tokens)"
            raise ConfigError("mtp.layers.1", f"{self.mtp_layers} layers", remedy)
        return self if wanted or not self.mtp_layers else self.model_copy(update={"mtp_layers": 0})

    @classmethod
    def load(cls, model_dir: str | Path) -> Self:
        """Read `config.json` in a model directory, and whether its weights have MTP layers. Raises ConfigError."""
        path = Path(model_dir) / "config.json"
        try:
            data = json.loads(path.read_bytes())  # bytes: json sees to byte order marks
        except OSError as error:
            raise ConfigError("file", str(path), f"cannot be read: {error.strerror}; give a model directory") from None
        except ValueError as error:
            raise ConfigError("file", str(path), f"is not valid JSON: {error}") from None
        if not isinstance(data, dict):
            raise ConfigError("file", str(path), "must hold a JSON object")
        return cls.from_hf(data, count_mtp_layers(Path(model_dir)))

    @classmethod
    def from_hf(cls, data: dict[str, Any], mtp_layers: int = 0) -> Self:
        """Read the content of a `config.json` in either spelling. Raises ConfigError."""
        fields = normalise(data) | {"mtp_layers": mtp_layers}
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            first = error.errors()[0]
            if isinstance(own := first.get("ctx", {}).get("error"), ConfigError):
                raise own from None
            name = str(first["loc"][0]) if first["loc"] else "config"
            remedy = str(first["msg"]).removeprefix("Value error, ")
            raise ConfigError(name, fields.get(name), remedy[:1].lower() + remedy[1:]) from None

    @model_validator(mode="after")
    def _check(self) -> Self:
        _divides(self, "num_attention_heads", "num_key_value_heads")
        _divides(self, "linear_num_value_heads", "linear_num_key_heads")
        if self.rotary_dim % 2 or self.rotary_dim > self.head_dim:
            raise ConfigError(
                "partial_rotary_factor",
                self.rotary_dim / self.head_dim,
                f"int(head_dim * factor) must be even and in 2..{self.head_dim}, is {self.rotary_dim}",
            )
        if self.moe_layers and self.num_experts_per_tok > self.num_experts:
            remedy = f"must be at most num_experts = {self.num_experts}"
            raise ConfigError("num_experts_per_tok", self.num_experts_per_tok, remedy)
        return self


def _divides(config: ModelConfig, whole: str, part: str) -> None:
    if getattr(config, whole) % getattr(config, part):
        raise ConfigError(whole, getattr(config, whole), f"must be a multiple of {part} = {getattr(config, part)}")
