"""Sharing the experts out among shards, and the tree in which they are summed."""

from __future__ import annotations

import pytest

from divisi.model.config import ModelConfig
from divisi.model.placement import additions, runs_of, shard_experts, subtrees, whole_share
from divisi.model.random_checkpoint import SMALL_CONFIG


def config_of(experts: int) -> ModelConfig:
    return ModelConfig.from_hf(SMALL_CONFIG | {"num_experts": experts, "num_experts_per_tok": 2})


@pytest.mark.parametrize(
    ("experts", "shards", "virtual", "sizes"),
    [
        (512, 4, 32, [128] * 4),
        (512, 3, 32, [176, 176, 160]),
        (5, 2, 32, [3, 2]),
        (4, 4, 8, [1] * 4),
        (64, 8, 8, [8] * 8),
    ],
)
def test_every_expert_has_one_shard(experts: int, shards: int, virtual: int, sizes: list[int]) -> None:
    shares = shard_experts(config_of(experts), shards, virtual)
    assert [len(share.expert_ids) for share in shares] == sizes
    assert sorted(e for share in shares for e in share.expert_ids) == list(range(experts))
    for share in shares:
        assert list(share.expert_ids) == sorted(share.expert_ids)
        assert {e % share.leaves for e in share.expert_ids} == {
            leaf for tree in share.subtrees for leaf in tree if leaf < share.leaves
        }


@pytest.mark.parametrize("shards", [0, 33])
def test_shards_without_experts_are_refused(shards: int) -> None:
    with pytest.raises(ValueError, match="use 1 to 32 expert shards, or more virtual shards"):
        shard_experts(config_of(512), shards)


def test_experts_are_dealt_in_turn() -> None:
    shares = shard_experts(config_of(64), 2)
    assert [runs_of(share.expert_ids) for share in shares] == ["0:16,32:48", "16:32,48:64"]
    assert whole_share(config_of(64)).subtrees == (range(32),)


@pytest.mark.parametrize("leaves", [1, 5, 7, 8, 32])
def test_subtrees_are_whole_and_few(leaves: int) -> None:
    for shards in range(1, leaves + 1):
        of_shard = subtrees(leaves, shards)
        trees = [tree for own in of_shard for tree in own]
        assert [leaf for tree in trees for leaf in tree][:leaves] == list(range(leaves))
        assert all(tree.start % len(tree) == 0 and len(tree).bit_count() == 1 for tree in trees)
        if shards.bit_count() == 1 and leaves % shards == 0:
            assert all(len(own) == 1 for own in of_shard)


@pytest.mark.parametrize("leaves", [1, 6, 8, 32])
def test_sums_are_added_in_the_same_tree_however_it_is_cut(leaves: int) -> None:
    """Additions as brackets: those of the whole tree, whatever the shards."""

    def brackets(tree: range) -> str:
        if len(tree) == 1:
            return str(tree.start) if tree.start < leaves else ""
        half = len(tree) // 2
        left, right = brackets(tree[:half]), brackets(tree[half:])
        return f"({left}+{right})" if right else left

    whole = brackets(range(1 << (leaves - 1).bit_length()))
    for shards in range(1, leaves + 1):
        trees = [tree for own in subtrees(leaves, shards) for tree in own]
        sums = [brackets(tree) for tree in trees]
        for left, right in additions(trees):
            sums[left] = f"({sums[left]}+{sums[right]})"
        assert sums[0] == whole, f"{shards} shards"
