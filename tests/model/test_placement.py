"""Sharing the experts out among shards."""

from __future__ import annotations

import pytest

from divisi.model.config import ModelConfig
from divisi.model.placement import shard_experts
from divisi.model.random_checkpoint import SMALL_CONFIG


@pytest.mark.parametrize(("experts", "shards", "sizes"), [(512, 3, [171, 171, 170]), (5, 2, [3, 2]), (4, 4, [1] * 4)])
def test_shard_experts(experts: int, shards: int, sizes: list[int]) -> None:
    config = ModelConfig.from_hf(SMALL_CONFIG | {"num_experts": experts, "num_experts_per_tok": 2})
    parts = shard_experts(config, shards)
    assert [len(part) for part in parts] == sizes
    assert [i for part in parts for i in part] == list(range(experts))


@pytest.mark.parametrize("shards", [0, 513])
def test_shard_experts_refuses_empty_shards(shards: int) -> None:
    with pytest.raises(ValueError, match="1 to 512"):
        shard_experts(ModelConfig.from_hf(SMALL_CONFIG | {"num_experts": 512}), shards)
