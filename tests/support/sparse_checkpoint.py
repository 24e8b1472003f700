"""The checkpoint of Qwen3-Next-80B-A3B as it is published, without its bytes: whole headers, files with holes."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path

from divisi.benchmarks.gpu.shapes import PUBLISHED as CONFIG

_FILE_BYTES = 4 * 10**9
_ATTENTION = {
    "q_proj.weight": [8192, 2048], "k_proj.weight": [512, 2048], "v_proj.weight": [512, 2048],
    "o_proj.weight": [2048, 4096], "q_norm.weight": [256], "k_norm.weight": [256],
}  # fmt: skip
_DELTA = {
    "A_log": [32], "dt_bias": [32], "conv1d.weight": [8192, 1, 4], "in_proj_qkvz.weight": [12288, 2048],
    "in_proj_ba.weight": [64, 2048], "norm.weight": [128], "out_proj.weight": [2048, 4096],
}  # fmt: skip
_EXPERT = {"gate_proj": [512, 2048], "up_proj": [512, 2048], "down_proj": [2048, 512]}


def write_sparse_checkpoint(folder: Path) -> None:
    """Some 11 MB on the disk for 163 GB."""
    folder.mkdir(parents=True)
    files: list[dict[str, list[int]]] = [{}]
    room = _FILE_BYTES
    for name, shape in _tensors():
        if _bytes(shape) > room:
            files.append({})
            room = _FILE_BYTES
        files[-1][name] = shape
        room -= _bytes(shape)
    where = {}
    for number, tensors in enumerate(files, 1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        _write(folder / file, tensors)
        where |= dict.fromkeys(tensors, file)
    (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}), encoding="utf-8")


def _tensors() -> Iterator[tuple[str, list[int]]]:
    yield "model.embed_tokens.weight", [151936, 2048]
    for index in range(48):
        yield from _layer(f"model.layers.{index}.", full=index % 4 == 3)
    yield "model.norm.weight", [2048]
    yield "lm_head.weight", [151936, 2048]
    yield "mtp.fc.weight", [2048, 4096]
    for name in ("pre_fc_norm_hidden", "pre_fc_norm_embedding", "norm"):
        yield f"mtp.{name}.weight", [2048]
    yield from _layer("mtp.layers.0.", full=True)


def _layer(prefix: str, full: bool) -> Iterator[tuple[str, list[int]]]:
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield f"{prefix}{name}.weight", [2048]
    mixer, parts = ("self_attn", _ATTENTION) if full else ("linear_attn", _DELTA)
    yield from ((f"{prefix}{mixer}.{name}", shape) for name, shape in parts.items())
    yield f"{prefix}mlp.gate.weight", [512, 2048]
    yield f"{prefix}mlp.shared_expert_gate.weight", [1, 2048]
    for name, shape in _EXPERT.items():
        yield f"{prefix}mlp.shared_expert.{name}.weight", shape
        yield from ((f"{prefix}mlp.experts.{expert}.{name}.weight", shape) for expert in range(512))


def _bytes(shape: list[int]) -> int:
    return 2 * math.prod(shape)


def _write(path: Path, tensors: dict[str, list[int]]) -> None:
    header, end = {}, 0
    for name, shape in tensors.items():
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + _bytes(shape)]}
        end += _bytes(shape)
    text = json.dumps(header).encode()
    with path.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        out.truncate(8 + len(text) + end)
