"""config.json: both spellings, defaults, and errors that name the field."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from divisi.model.config import ModelConfig
from divisi.model.errors import ConfigError

PUBLISHED: dict[str, Any] = {
    "architectures": ["Qwen3NextForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 151643, "decoder_sparse_step": 1, "eos_token_id": 151645, "full_attention_interval": 4,
    "head_dim": 256,
    "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 5120,
    "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
    "linear_value_head_dim": 128, "max_position_embeddings": 262144, "mlp_only_layers": [], "model_type": "qwen3_next",
    "moe_intermediate_size": 512, "norm_topk_prob": True, "num_attention_heads": 16, "num_experts": 512,
    "num_experts_per_tok": 10, "num_hidden_layers": 48, "num_key_value_heads": 2, "output_router_logits": False,
    "partial_rotary_factor": 0.25, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 10000000,
    "router_aux_loss_coef": 0.001, "shared_expert_intermediate_size": 512, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.57.0.dev0", "use_cache": True, "use_sliding_window": False,
    "vocab_size": 151936,
}  # fmt: skip


def changed(**fields: Any) -> dict[str, Any]:
    """The published config with fields set, or removed where the value is Ellipsis."""
    return {name: value for name, value in {**PUBLISHED, **fields}.items() if value is not ...}


def test_published_spelling() -> None:
    config = ModelConfig.from_hf(PUBLISHED)
    assert (config.rope_theta, config.rotary_dim, config.dtype) == (1e7, 64, "bfloat16")
    assert config.full_layers == tuple(range(3, 48, 4))
    assert len(config.linear_layers) == 36
    assert config.conv_dim == 2 * 16 * 128 + 32 * 128
    assert config.moe_layers == tuple(range(48))


def test_transformers_spelling_gives_the_same() -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.Qwen3NextConfig(**PUBLISHED).to_dict()
    assert "rope_parameters" in theirs
    assert "layer_types" in theirs
    assert ModelConfig.from_hf(theirs) == ModelConfig.from_hf(PUBLISHED)


def test_defaults_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.Qwen3NextConfig()
    ours = ModelConfig.from_hf({"model_type": "qwen3_next"})
    assert list(ours.layer_types) == theirs.layer_types
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.rotary_dim == int(theirs.head_dim * theirs.rope_parameters["partial_rotary_factor"])
    derived = {"layer_types", "rope_theta", "rotary_dim", "moe_layers", "dtype", "mtp_layers"}
    for name in set(ModelConfig.model_fields) - derived:
        assert getattr(ours, name) == getattr(theirs, name), name


def test_explicit_layer_types_win_over_the_interval() -> None:
    kinds = ["full_attention", "linear_attention"]
    config = ModelConfig.from_hf(changed(num_hidden_layers=2, layer_types=kinds, full_attention_interval=4))
    assert config.layer_types == tuple(kinds)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"decoder_sparse_step": 2}, (1, 3, 5)),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [3]}, (1, 5)),
        ({"mlp_only_layers": [0, 5]}, (1, 2, 3, 4)),
        ({"num_experts": 0}, ()),
        ({"mlp_only_layers": None}, (0, 1, 2, 3, 4, 5)),
    ],
)
def test_moe_layers(fields: dict[str, Any], expected: tuple[int, ...]) -> None:
    config = ModelConfig.from_hf(changed(num_hidden_layers=6, **fields))
    assert config.moe_layers == expected
    assert [i for i in range(6) if config.is_moe(i)] == list(expected)


def test_both_rope_spellings_may_agree() -> None:
    table = {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25}
    assert ModelConfig.from_hf(changed(rope_parameters=table)) == ModelConfig.from_hf(PUBLISHED)
    factor_only = changed(
        rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}, partial_rotary_factor=...
    )
    assert ModelConfig.from_hf(factor_only).rotary_dim == 128


@pytest.mark.parametrize(
    ("fields", "field", "part"),
    [
        ({"model_type": "llama"}, "model_type", "qwen3_next"),
        ({"architectures": ["Qwen3NextForTokenClassification"]}, "architectures", "expected"),
        ({"hidden_act": "gelu"}, "hidden_act", "silu"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling.rope_type", "native context"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_scaling.type", "native context"),
        ({"rope_parameters": {"rope_theta": 5e6}}, "rope_theta", "conflicts with rope_parameters.rope_theta"),
        ({"rope_parameters": {"partial_rotary_factor": 1.0}}, "partial_rotary_factor", "keep one"),
        ({"rope_parameters": {"mrope_section": [1]}}, "rope_parameters.mrope_section", "unknown"),
        ({"rope_parameters": "x"}, "rope_parameters", "object"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor", "at most 1"),
        ({"partial_rotary_factor": 0.001}, "rotary_dim", "greater than 0"),
        ({"partial_rotary_factor": 0.0137}, "partial_rotary_factor", "even"),
        ({"layer_types": ["full_attention"]}, "layer_types", "48"),
        ({"layer_types": ["mamba"] * 48}, "layer_types[0]", "linear_attention"),
        ({"full_attention_interval": 0}, "full_attention_interval", "at least 1"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step", "at least 1"),
        ({"mlp_only_layers": [48]}, "mlp_only_layers", "0..47"),
        ({"torch_dtype": "float8_e4m3fn"}, "torch_dtype", "bfloat16"),
        ({"dtype": "float32"}, "dtype", "conflicts with torch_dtype"),
        ({"use_sliding_window": True}, "use_sliding_window", "not supported"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config", "not supported"),
        ({"routed_scaling_factor": 2.5}, "routed_scaling_factor", "unknown"),
        ({"num_attention_heads": 3}, "num_attention_heads", "multiple of num_key_value_heads"),
        ({"linear_num_value_heads": 17}, "linear_num_value_heads", "multiple"),
        ({"num_experts_per_tok": 600}, "num_experts_per_tok", "num_experts = 512"),
        ({"vocab_size": "many"}, "vocab_size", "integer"),
        ({"hidden_size": -4}, "hidden_size", "greater than 0"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers", "integer"),
        ({"head_dim": None}, "head_dim", "integer"),
        ({"norm_topk_prob": 1}, "norm_topk_prob", "boolean"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps", "number"),
    ],
)
def test_errors_name_field_and_value(fields: dict[str, Any], field: str, part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_hf(changed(**fields))
    assert caught.value.field == field
    assert part in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize(("text", "part"), [(None, "cannot be read"), ("{", "not valid JSON"), ("[]", "JSON object")])
def test_bad_file(text: str | None, part: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=part):
        ModelConfig.load(tmp_path)


def test_loading_needs_no_torch(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED))
    code = (
        "import sys; from divisi.model.config import ModelConfig; ModelConfig.load(sys.argv[1]);"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False, timeout=60).returncode == 0


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_file_may_begin_with_a_byte_order_mark(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED), encoding=encoding)
    assert ModelConfig.load(tmp_path) == ModelConfig.from_hf(PUBLISHED)
