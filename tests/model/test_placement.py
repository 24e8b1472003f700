"""Sharing the experts out among shards, and the tree in which they are summed."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from divisi.model.config import ModelConfig
from divisi.model.placement import Layout, additions, runs_of, shard_experts, whole_share
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


def layouts(leaves: int) -> Iterator[Layout]:
    """The even ones, and seeded others: uneven, in pieces, with seats that serve nothing."""
    yield from (Layout.even(leaves, shards) for shards in range(1, leaves + 1))
    rng = random.Random(leaves)
    for _ in range(40):
        seat_of = [rng.randrange(1, 9) for _ in range(leaves)]
        yield Layout(leaves, tuple(tuple(leaf for leaf in range(leaves) if seat_of[leaf] == seat) for seat in range(9)))


@pytest.mark.parametrize("leaves", [1, 5, 7, 8, 32])
def test_a_layout_says_who_serves_each_leaf(leaves: int) -> None:
    for layout in layouts(leaves):
        assert all(leaf in layout.served[seat] for leaf, seat in enumerate(layout.server))
        assert layout.seats == tuple(sorted(set(layout.server)))


@pytest.mark.parametrize("served", [((0, 1), (1, 2)), ((0,), (2,)), ((0, 1, 2, 3),), ((1, 0), (2,)), ()], ids=str)
def test_a_layout_with_a_leaf_twice_nowhere_or_out_of_order_is_refused(served: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ValueError, match="each of 3 virtual shards once"):
        Layout(3, served)


def test_the_even_layout_is_consecutive_with_the_larger_shares_first() -> None:
    assert Layout.even(8, 3).served == ((0, 1, 2), (3, 4, 5), (6, 7))
    assert Layout.even(8, 3).subtrees(1) == (range(3, 4), range(4, 6))
    assert Layout.even(6, 4).subtrees(3) == (range(5, 6),)
    assert Layout.even(5, 5).subtrees(4) == (range(4, 8),), "nothing is beyond the fifth leaf"


@pytest.mark.parametrize("leaves", [1, 5, 7, 8, 32])
def test_subtrees_are_whole_and_few(leaves: int) -> None:
    for layout in layouts(leaves):
        for seat, own in enumerate(layout.served):
            trees = layout.subtrees(seat)
            assert tuple(leaf for tree in trees for leaf in tree if leaf < leaves) == own
            assert all(tree.start % len(tree) == 0 and len(tree).bit_count() == 1 for tree in trees)
            twins = {(tree.start ^ len(tree), len(tree)) for tree in trees}
            assert not twins & {(tree.start, len(tree)) for tree in trees}, "two that make up a larger one"
    for shards in (1, 2, 4, 8):
        if leaves % shards == 0:
            assert all(len(Layout.even(leaves, shards).subtrees(seat)) == 1 for seat in range(shards))


@pytest.mark.parametrize("leaves", [1, 6, 8, 32])
def test_sums_are_added_in_the_same_tree_however_it_is_cut(leaves: int) -> None:
    """Additions as brackets: those of the whole tree, whoever serves which leaves."""

    def brackets(tree: range) -> str:
        if len(tree) == 1:
            return str(tree.start) if tree.start < leaves else ""
        half = len(tree) // 2
        left, right = brackets(tree[:half]), brackets(tree[half:])
        return f"({left}+{right})" if right else left

    whole = brackets(range(1 << (leaves - 1).bit_length()))
    for layout in layouts(leaves):
        trees = sorted((tree for seat in layout.seats for tree in layout.subtrees(seat)), key=lambda tree: tree.start)
        sums = [brackets(tree) for tree in trees]
        for left, right in additions(trees):
            sums[left] = f"({sums[left]}+{sums[right]})"
        assert sums[0] == whole, str(layout)
