"""Random checkpoints load in transformers and have a working tokenizer and template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from divisi.model.checkpoint import Checkpoint
from divisi.model.checkpoint.layout import ExpertLayout
from divisi.model.config import ModelConfig
from divisi.model.errors import ConfigError
from divisi.model.random_checkpoint import SMALL_CONFIG, write_random_checkpoint

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("small")
    write_random_checkpoint(out, seed=1)
    return out


@pytest.mark.parametrize("layout", ["published", "packed"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tie_word_embeddings": True},
        {"mlp_only_layers": [1, 3], "attention_bias": True},
        {
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5},
            "rope_theta": None,
            "partial_rotary_factor": None,
        },
    ],
)
def test_transformers_loads_it_without_missing_keys(
    layout: ExpertLayout, fields: dict[str, Any], tmp_path: Path
) -> None:
    given = {name: value for name, value in (SMALL_CONFIG | fields).items() if value is not None}
    write_random_checkpoint(tmp_path, given, layout=layout)
    _, info = transformers.Qwen3NextForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info


def test_the_seed_decides_the_weights(small: Path, tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "same", seed=1)
    write_random_checkpoint(tmp_path / "other", seed=2)
    folders = (small, tmp_path / "same", tmp_path / "other")
    first, same, other = (load_file(path / "model.safetensors") for path in folders)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    tokenizers = [(path / "tokenizer.json").read_bytes() for path in (small, tmp_path / "same")]
    assert tokenizers[0] == tokenizers[1]


def test_logits_are_decisive(small: Path) -> None:
    model = transformers.Qwen3NextForCausalLM.from_pretrained(small, dtype=torch.float32)
    tokens = torch.randint(0, 1200, (1, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        top = model(tokens).logits.topk(2).values[0]
    assert (top[:, 0] - top[:, 1]).median() > 0.1


@pytest.mark.parametrize("text", ["Hello, world! 123", "你好 🎻 naïve\n\n\ttabs", "<|im_start|>user\nhi<|im_end|>", ""])
def test_tokenizer_round_trip(small: Path, text: str) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(small)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert max(ids, default=0) < SMALL_CONFIG["vocab_size"]


def test_special_tokens(small: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(small)
    config = json.loads((small / "config.json").read_text())
    generation = json.loads((small / "generation_config.json").read_text())
    assert config["eos_token_id"] == tokenizer.convert_tokens_to_ids("<|im_end|>") == tokenizer.eos_token_id
    assert generation["eos_token_id"][0] == config["eos_token_id"]
    assert len(tokenizer.encode("<tool_call></tool_call><think></think>", add_special_tokens=False)) == 4


def test_chat_template(small: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(small)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [
            {"type": "function", "function": {"name": "get", "arguments": {"city": "Rome"}}}]},
        {"role": "tool", "content": "sunny"},
    ]  # fmt: skip
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWeather?<|im_end|>\n<|im_start|>assistant\n"
        '<tool_call>\n{"name": "get", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\nsunny\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )
    tools = [{"type": "function", "function": {"name": "get", "parameters": {}}}]
    assert '<tools>\n{"type": "function"' in tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)


def test_large_vocabularies_stay_partly_unfilled(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, SMALL_CONFIG | {"vocab_size": 5000, "num_hidden_layers": 4})
    assert 300 < len(transformers.AutoTokenizer.from_pretrained(tmp_path)) < 5000


def test_too_small_a_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least 265"):
        write_random_checkpoint(tmp_path, SMALL_CONFIG | {"vocab_size": 128})
    write_random_checkpoint(tmp_path, SMALL_CONFIG | {"vocab_size": 128}, tokenizer=False)


def test_what_transformers_saves_is_read(small: Path, tmp_path: Path) -> None:
    """In its spelling of the config and in whichever expert layout it writes."""
    model = transformers.Qwen3NextForCausalLM.from_pretrained(small)
    model.save_pretrained(tmp_path, max_shard_size="1MB")
    assert "rope_parameters" in json.loads((tmp_path / "config.json").read_text())
    ours, theirs = ModelConfig.load(small), ModelConfig.load(tmp_path)
    assert theirs == ours
    checkpoint = Checkpoint.open(tmp_path)
    checkpoint.check_all(theirs)
    experts = [Checkpoint.open(path).read_experts(1, [2, 3], ours, torch.float32) for path in (small, tmp_path)]
    assert torch.equal(experts[0][0], experts[1][0])
    assert torch.equal(experts[0][1], experts[1][1])
