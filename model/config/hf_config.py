"""The two spellings of a Qwen3-Next `config.json`, brought to the fields of `ModelConfig`.

Nothing that changes the model's function is dropped silently: a field that is neither read here
nor known to be without effect on inference is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from divisi.model.errors import ConfigError

# Defaults of transformers' Qwen3NextConfig; a published config.json relies on some of them.
_PLAIN: dict[str, object] = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "attention_bias": False,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "norm_topk_prob": True,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "intermediate_size": 5632,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "max_position_embeddings": 32768,
    "hidden_act": "silu",
}
_DEFAULT_INTERVAL = 4
_DEFAULT_THETA = 10000.0
_DEFAULT_ROTARY_FACTOR = 0.25
_DERIVED = {
    "model_type", "architectures", "dtype", "torch_dtype", "layer_types", "full_attention_interval",
    "rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor", "mlp_only_layers", "decoder_sparse_step",
}  # fmt: skip
# Training, generation and bookkeeping: without effect on what a forward pass computes.
_HARMLESS = {
    "attention_dropout", "auto_map", "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "use_cache",
    "output_router_logits", "router_aux_loss_coef", "transformers_version", "_name_or_path", "_attn_implementation",
    "use_return_dict", "return_dict", "output_attentions", "output_hidden_states", "problem_type", "id2label",
    "label2id", "task_specific_params", "is_encoder_decoder", "chunk_size_feed_forward", "num_nextn_predict_layers",
    "mtp_num_hidden_layers", "max_window_layers", "unsloth_fixed",
}  # fmt: skip
# Meaningful only when set: their neutral values are let through.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "use_sliding_window": (False, None),
    "sliding_window": (None,),
    "quantization_config": (None,),
    "per_layer_config": (None,),
}


def normalise(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return keyword arguments for `ModelConfig` from the content of a config.json. Raises ConfigError."""
    _check_kind(data)
    _check_unknown(data)
    fields: dict[str, Any] = {name: data.get(name, default) for name, default in _PLAIN.items()}
    layers = _integer(data, "num_hidden_layers", fields["num_hidden_layers"], at_least=1)
    head_dim = _integer(data, "head_dim", fields["head_dim"], at_least=1)
    theta, factor = _rope(data)
    fields["rope_theta"] = theta
    fields["rotary_dim"] = int(head_dim * factor)
    fields["rms_norm_eps"] = _number("rms_norm_eps", fields["rms_norm_eps"])
    fields["layer_types"] = _layer_types(data, layers)
    fields["moe_layers"] = _moe_layers(data, layers, _integer(data, "num_experts", fields["num_experts"], at_least=0))
    fields["dtype"] = _dtype(data)
    if fields["hidden_act"] != "silu":
        raise ConfigError("hidden_act", fields["hidden_act"], "only 'silu' is supported")
    return fields


def _check_kind(data: Mapping[str, Any]) -> None:
    kind = data.get("model_type")
    if kind != "qwen3_next":
        raise ConfigError("model_type", kind, "Divisi serves 'qwen3_next' checkpoints; check the model directory")
    architectures = data.get("architectures")
    if architectures and "Qwen3NextForCausalLM" not in architectures:
        raise ConfigError("architectures", architectures, "expected ['Qwen3NextForCausalLM']")


def _check_unknown(data: Mapping[str, Any]) -> None:
    for name, value in data.items():
        if name in _NEUTRAL:
            if value not in _NEUTRAL[name]:
                raise ConfigError(name, value, "not supported; use a checkpoint without it")
        elif name not in _PLAIN and name not in _DERIVED and name not in _HARMLESS and not name.endswith("_version"):
            raise ConfigError(name, value, "unknown field, which might change what the model computes; remove it")


def _rope(data: Mapping[str, Any]) -> tuple[float, float]:
    """Return (theta, partial rotary factor); both spellings may be there as long as they agree."""
    spelled: dict[str, dict[str, object]] = {"rope_theta": {}, "partial_rotary_factor": {}}
    for name, found in spelled.items():
        if data.get(name) is not None:
            found[name] = data[name]
    for table_name in ("rope_parameters", "rope_scaling"):
        table = data.get(table_name)
        if table is None:
            continue
        _check_rope_table(table_name, table)
        for name, found in spelled.items():
            if table.get(name) is not None:
                found[f"{table_name}.{name}"] = table[name]
    theta = _agreed(spelled["rope_theta"], _DEFAULT_THETA)
    factor = _agreed(spelled["partial_rotary_factor"], _DEFAULT_ROTARY_FACTOR)
    if not 0 < factor <= 1:
        raise ConfigError("partial_rotary_factor", factor, "must be above 0 and at most 1")
    return theta, factor


def _check_rope_table(table_name: str, table: object) -> None:
    if not isinstance(table, Mapping):
        raise ConfigError(table_name, table, "must be an object or null")
    for name in ("rope_type", "type"):
        if table.get(name, "default") != "default":
            remedy = "scaled rotary embeddings are not supported; use the native context (rope_scaling: null)"
            raise ConfigError(f"{table_name}.{name}", table[name], remedy)
    for name in table:
        if name not in ("rope_type", "type", "rope_theta", "partial_rotary_factor"):
            raise ConfigError(f"{table_name}.{name}", table[name], "unknown field; only default rotary embeddings")


def _agreed(found: dict[str, object], default: float) -> float:
    values = {name: _number(name, value) for name, value in found.items()}
    if len(set(values.values())) > 1:
        name = next(iter(values))
        others = ", ".join(f"{other} = {value}" for other, value in values.items() if other != name)
        raise ConfigError(name, values[name], f"conflicts with {others}; keep one")
    return next(iter(values.values()), default)


def _layer_types(data: Mapping[str, Any], layers: int) -> tuple[str, ...]:
    """Explicit layer types win over the interval, as in transformers."""
    kinds = data.get("layer_types")
    if kinds is None:
        interval = _integer(data, "full_attention_interval", _DEFAULT_INTERVAL, at_least=1)
        return tuple("linear_attention" if (i + 1) % interval else "full_attention" for i in range(layers))
    if not isinstance(kinds, list | tuple) or len(kinds) != layers:
        raise ConfigError("layer_types", kinds, f"must be a list of num_hidden_layers = {layers} entries")
    for i, kind in enumerate(kinds):
        if kind not in ("linear_attention", "full_attention"):
            raise ConfigError(f"layer_types[{i}]", kind, "must be 'linear_attention' or 'full_attention'")
    return tuple(kinds)


def _moe_layers(data: Mapping[str, Any], layers: int, num_experts: int) -> tuple[int, ...]:
    """Layers with routed experts: `(i + 1) % decoder_sparse_step == 0`, less `mlp_only_layers`."""
    step = _integer(data, "decoder_sparse_step", 1, at_least=1)
    dense = data.get("mlp_only_layers")
    dense = [] if dense is None else dense
    if not isinstance(dense, list | tuple) or not all(type(i) is int and 0 <= i < layers for i in dense):
        raise ConfigError("mlp_only_layers", dense, f"must be a list of layer indices in 0..{layers - 1}")
    if num_experts == 0:
        return ()
    return tuple(i for i in range(layers) if i not in dense and (i + 1) % step == 0)


def _dtype(data: Mapping[str, Any]) -> str:
    found = {name: data[name] for name in ("dtype", "torch_dtype") if data.get(name) is not None}
    short = {name: str(value).removeprefix("torch.") for name, value in found.items()}
    if len(set(short.values())) > 1:
        raise ConfigError("dtype", found["dtype"], f"conflicts with torch_dtype = {found['torch_dtype']!r}; keep one")
    for name, value in short.items():
        if value not in ("bfloat16", "float32", "float16"):
            raise ConfigError(name, value, "must be bfloat16, float32 or float16")
    return next(iter(short.values()), "bfloat16")


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(name, value, "must be a number")
    return float(value)


def _integer(data: Mapping[str, Any], name: str, default: Any, at_least: int) -> int:
    value = data.get(name, default)
    if type(value) is not int or value < at_least:
        raise ConfigError(name, value, f"must be an integer of at least {at_least}")
    return value
