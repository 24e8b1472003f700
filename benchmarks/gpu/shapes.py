"""The cases: small and odd ones that are only checked, and those of Qwen3-Next-80B-A3B, which are timed as well."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from divisi.benchmarks.gpu import cases, mixture_cases, sampling_cases
from divisi.benchmarks.gpu.cases import Case, DeltaShape, Draw, Heads

PUBLISHED: dict[str, Any] = {
    "architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next", "torch_dtype": "bfloat16",
    "hidden_size": 2048, "num_hidden_layers": 48, "vocab_size": 151936, "max_position_embeddings": 262144,
    "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256, "partial_rotary_factor": 0.25,
    "rope_theta": 10000000, "rope_scaling": None, "rms_norm_eps": 1e-06, "full_attention_interval": 4,
    "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
    "linear_value_head_dim": 128, "num_experts": 512, "num_experts_per_tok": 10, "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
    "intermediate_size": 5120, "hidden_act": "silu", "attention_bias": False, "tie_word_embeddings": False,
    "bos_token_id": 151643, "eos_token_id": 151645, "use_sliding_window": False,
}  # fmt: skip
"""Qwen3-Next-80B-A3B: the fields of its config.json."""
Make = Callable[[Draw, str], Case]
SMALL_DELTA, ODD_DELTA = DeltaShape(1, 2, 16, 16, 4), DeltaShape(2, 4, 12, 20, 3)
SMALL_HEADS, ODD_HEADS = Heads(4, 2, 16, 8, 4), Heads(3, 1, 24, 6, 3)
HEADS, DELTA, DELTA_8 = Heads(16, 2, 256, 64, 16), DeltaShape(16, 32, 128, 128, 4), DeltaShape(4, 8, 128, 128, 4)

_experts = partial(cases.routed_experts, chosen=10, experts=512, width=2048, inner=512)
_decode = partial(cases.attention, operation="attention_decode", heads=HEADS)
_prefill = partial(cases.attention, operation="attention_prefill", heads=HEADS)
_small_decode = partial(cases.attention, operation="attention_decode")
_small_prefill = partial(cases.attention, operation="attention_prefill")

CHECKED: Mapping[str, Make] = {
    "norm": partial(cases.rms_norm, tokens=3, width=61),
    "norm of nothing": partial(cases.rms_norm, tokens=0, width=16),
    "add and norm": partial(cases.add_rms_norm, tokens=5, width=96),
    "silu": partial(cases.silu_mul, tokens=3, inner=1031),
    "route": partial(cases.route, tokens=7, experts=37, chosen=5),
    "route with ties": partial(cases.route, tokens=7, experts=37, chosen=5, ties=True),
    "route to all": partial(cases.route, tokens=1, experts=8, chosen=8),
    "mixture": partial(mixture_cases.mixture_inputs, tokens=3, experts=13, chosen=3, width=40, inner=24),
    "mixture's norm": partial(mixture_cases.mixture_add_norm, tokens=4, chosen=3, width=40, inner=24, experts=5),
    "mixture's norm of a sum": partial(
        mixture_cases.mixture_add_norm, tokens=3, chosen=3, width=61, inner=24, experts=5, summed=True
    ),
    "inputs": partial(cases.attention_inputs, tokens=5, heads=SMALL_HEADS, pages=4),
    "keys and values only": partial(cases.attention_inputs, tokens=3, heads=replace(SMALL_HEADS, query=0), pages=4),
    "odd inputs": partial(cases.attention_inputs, tokens=3, heads=ODD_HEADS, pages=3),
    "sampling": partial(sampling_cases.choose_tokens, rows=3, vocab=4099),
    "decode": partial(_small_decode, heads=SMALL_HEADS, lengths=[9, 0, 37], rows=[1, 1, 1]),
    "verify": partial(_small_decode, heads=ODD_HEADS, lengths=[5, 70, 0, 8], rows=[3, 4, 1, 0]),
    "decode without the first key": partial(
        _small_decode, heads=ODD_HEADS, lengths=[1, 70, 5], rows=[1, 1, 2], first=1
    ),
    "decode of splits": partial(_small_decode, heads=Heads(2, 1, 16, 8, 64), lengths=[1300, 3], rows=[2, 1]),
    "prefill of wide heads": partial(_small_prefill, heads=Heads(1, 1, 264, 8, 4), lengths=[3], rows=[2]),
    "prefill": partial(_small_prefill, heads=SMALL_HEADS, lengths=[0, 13, 4], rows=[5, 0, 40]),
    "experts": partial(cases.routed_experts, tokens=7, chosen=3, experts=5, width=40, inner=24, elsewhere=2),
    "no tokens": partial(cases.routed_experts, tokens=0, chosen=2, experts=3, width=16, inner=16),
    "many to one expert": partial(cases.routed_experts, tokens=196, chosen=1, experts=2, width=40, inner=24, only=1),
    "many to each expert": partial(
        cases.routed_experts, tokens=50, chosen=4, experts=3, width=16, inner=16, elsewhere=1
    ),
    "all to one expert": partial(cases.routed_experts, tokens=37, chosen=1, experts=3, width=16, inner=16, only=1),
    "delta decode": partial(cases.gated_delta_decode, shape=SMALL_DELTA, rows=[1, 1, 1], lags=[1, 0, 1], max_rows=1),
    "delta verify": partial(
        cases.gated_delta_decode, shape=ODD_DELTA, rows=[3, 1, 4, 0], lags=[4, 0, 2, 0], max_rows=4
    ),
    "flush": partial(cases.gated_delta_flush, shape=ODD_DELTA, lags=[4, 0, 2], max_rows=4),
    "delta prefill": partial(
        cases.gated_delta_prefill, shape=SMALL_DELTA, lengths=[0, 7, 2], rows=[131, 5, 64],
        middles=[[3, 64, 100], [], [1]],
    ),
    "delta prefill, one token repeated": partial(
        cases.gated_delta_prefill, shape=SMALL_DELTA, lengths=[0], rows=[140], repeated=True
    ),
    "odd delta prefill": partial(cases.gated_delta_prefill, shape=ODD_DELTA, lengths=[9, 0], rows=[0, 70]),
}  # fmt: skip
"""Ragged, empty, with ties; small enough for an interpreter."""

CHECKED_LARGE: Mapping[str, Make] = {
    "verify, ragged": partial(_decode, lengths=[700, 1, 513, 64, 0], rows=[9, 1, 4, 0, 3]),
    "prefill, ragged": partial(_prefill, lengths=[0, 100, 1000], rows=[300, 1, 130]),
    "experts, skewed": partial(_experts, tokens=700, only=5),
    "experts, sharded": partial(_experts, experts=128, tokens=77, elsewhere=384),
    "delta verify, ragged": partial(
        cases.gated_delta_decode, shape=DELTA, rows=[9, 1, 4, 0, 2], lags=[9, 0, 3, 0, 5], max_rows=9
    ),
    "delta prefill, repeated": partial(
        cases.gated_delta_prefill, shape=DELTA, lengths=[0], rows=[500], repeated=True
    ),
    "delta prefill, ragged": partial(
        cases.gated_delta_prefill, shape=DELTA, lengths=[0, 70, 3], rows=[300, 1, 129],
        middles=[[64, 100, 250], [], [128]],
    ),
}  # fmt: skip
"""At the published head and expert sizes, too slow for an interpreter."""

TIMED: Sequence[tuple[str, Make]] = (
    ("T=64", partial(cases.rms_norm, tokens=64, width=2048)),
    ("T=8192", partial(cases.rms_norm, tokens=8192, width=2048)),
    ("T=64", partial(cases.add_rms_norm, tokens=64, width=2048)),
    ("T=8192", partial(cases.add_rms_norm, tokens=8192, width=2048)),
    ("T=64", partial(cases.silu_mul, tokens=64, inner=512)),
    ("T=8192", partial(cases.silu_mul, tokens=8192, inner=512)),
    ("T=1, 10 of 512", partial(cases.route, tokens=1, experts=512, chosen=10)),
    ("T=64, 10 of 512", partial(cases.route, tokens=64, experts=512, chosen=10)),
    ("T=8192, 10 of 512", partial(cases.route, tokens=8192, experts=512, chosen=10)),
    ("T=64", partial(mixture_cases.mixture_inputs, tokens=64, experts=512, chosen=10, width=2048, inner=512)),
    ("T=64 of a sum", partial(
        mixture_cases.mixture_add_norm, tokens=64, chosen=10, width=2048, inner=512, experts=512, summed=True
    )),
    ("T=64, its experts too", partial(
        mixture_cases.mixture_add_norm, tokens=64, chosen=10, width=2048, inner=512, experts=512, summed=False
    )),
    ("T=64", partial(cases.attention_inputs, tokens=64, heads=HEADS, pages=600)),
    ("T=8192", partial(cases.attention_inputs, tokens=8192, heads=HEADS, pages=600)),
    ("T=64", partial(sampling_cases.choose_tokens, rows=64, vocab=151_936)),
    ("1 x 1 row at 32768", partial(_decode, lengths=[32767], rows=[1])),
    ("64 x 1 row at 4096", partial(_decode, lengths=[4095] * 64, rows=[1] * 64)),
    ("64 x 4 rows at 4096", partial(_decode, lengths=[4092] * 64, rows=[4] * 64)),
    ("8192 rows at 0", partial(_prefill, lengths=[0], rows=[8192])),
    ("4 x 2048 rows at 8192", partial(_prefill, lengths=[8192] * 4, rows=[2048] * 4)),
    ("T=1", partial(_experts, tokens=1)),
    ("T=8", partial(_experts, tokens=8)),
    ("T=64", partial(_experts, tokens=64)),
    ("T=256", partial(_experts, tokens=256)),
    ("T=2048", partial(_experts, tokens=2048)),
    ("T=8192", partial(_experts, tokens=8192)),
    ("T=32768, of 4 shards", partial(_experts, tokens=32768, experts=128, elsewhere=384)),
    ("1 x 1 row", partial(cases.gated_delta_decode, shape=DELTA, rows=[1], lags=[1], max_rows=1)),
    ("64 x 1 row", partial(cases.gated_delta_decode, shape=DELTA, rows=[1] * 64, lags=[1] * 64, max_rows=1)),
    ("256 x 1 row", partial(cases.gated_delta_decode, shape=DELTA, rows=[1] * 256, lags=[1] * 256, max_rows=1)),
    ("64 x 4 rows after 3", partial(cases.gated_delta_decode, shape=DELTA, rows=[4] * 64, lags=[3] * 64, max_rows=4)),
    ("8192 rows, 32 heads", partial(cases.gated_delta_prefill, shape=DELTA, lengths=[0], rows=[8192])),
    ("8192 rows, 8 heads", partial(cases.gated_delta_prefill, shape=DELTA_8, lengths=[0], rows=[8192])),
    ("4 x 2048 rows, 32 heads", partial(cases.gated_delta_prefill, shape=DELTA, lengths=[64] * 4, rows=[2048] * 4)),
)
"""Name and case; names repeat from operation to operation."""
