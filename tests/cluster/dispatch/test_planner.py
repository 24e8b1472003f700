"""Which mode the planner takes, and its model."""

from __future__ import annotations

from dataclasses import replace

import pytest

from divisi.cluster.dispatch.all_to_all import capacity
from divisi.cluster.dispatch.planner import (
    ETHERNET_100G,
    MEMORY,
    NVLINK,
    ZEN,
    Layer,
    Link,
    Load,
    Mode,
    cut_gain,
    cut_rows,
    hit_rate,
    layer_s,
    plan_mode,
)


def load_of(workers: int, shards: int, rows: int = 64) -> Load:
    """Of the 80 B model."""
    return Load(workers, shards, rows, 4096 + 80, 8192, hit_rate(10, 32, shards))


@pytest.mark.parametrize(("shards", "hit"), [(1, 1.0), (2, 0.999), (4, 0.944), (8, 0.737), (16, 0.475), (32, 0.272)])
def test_hit_rate(shards: int, hit: float) -> None:
    assert hit_rate(10, 32, shards) == pytest.approx(hit, abs=1e-3)


@pytest.mark.parametrize("link", [MEMORY, ETHERNET_100G, NVLINK], ids=str)
def test_few_shards_get_all_rows(link: Link) -> None:
    for shards in (1, 2):
        assert plan_mode(load_of(1, shards), link) == "broadcast"


@pytest.mark.parametrize(("workers", "shards"), [(4, 8), (8, 16), (8, 32)])
def test_over_a_network_many_shards_get_the_rows_that_visit_them(workers: int, shards: int) -> None:
    assert plan_mode(load_of(workers, shards), ETHERNET_100G) == "all_to_all"


def test_more_rows_cost_more_and_small_batches_are_not_worth_picking() -> None:
    for mode in ("broadcast", "all_to_all"):
        times = [layer_s(mode, load_of(2, 8, rows), ETHERNET_100G) for rows in (1, 16, 256)]  # type: ignore[arg-type]
        assert times == sorted(times)
    assert plan_mode(load_of(2, 8, 1), MEMORY) == "broadcast"


_ODD = Link(1e-3, 20e-3, bytes_per_s=1e6, pick_s=300e-3, picked_bytes_per_s=2e6, count_s=4000e-3)


def test_a_layer_is_woken_once_and_handles_each_message_at_both_ends() -> None:
    load = Load(3, 5, rows=10, request_bytes=300, reply_bytes=700, hit=0.5)
    assert layer_s("broadcast", load, _ODD) == pytest.approx(1e-3 + (5 + 3) * 20e-3 + 5 * 10e-3)
    picking_s = 5 * (300e-3 + 2.5e-3) + 3 * 4000e-3
    assert layer_s("all_to_all", load, _ODD) == pytest.approx(1e-3 + (5 + 3) * 20e-3 + 5 * 5e-3 + picking_s)


@pytest.mark.parametrize("mode", ["broadcast", "all_to_all"])
def test_ranks_that_share_cores_take_what_all_of_them_do(mode: Mode) -> None:
    load = Load(3, 5, rows=10, request_bytes=300, reply_bytes=700, hit=0.5)
    one, two = (layer_s(mode, replace(load, cores=cores), _ODD) - _ODD.latency_s for cores in (1, 2))
    assert one == pytest.approx(2 * two)
    pair_s = layer_s(mode, replace(load, workers=1, shards=1), _ODD) - _ODD.latency_s
    assert one == pytest.approx(15 * pair_s)
    assert layer_s(mode, replace(load, cores=100), _ODD) == layer_s(mode, load, _ODD)


def test_capacity_is_that_of_a_bucket_and_never_more_than_the_rows() -> None:
    assert capacity(64, 1.0, 5.0) == 64
    assert capacity(1, 0.27, 5.0) == 1
    assert capacity(1000, 0.25, 5.0) == capacity(1024, 0.25, 5.0) == 326
    assert capacity(300, 0.25, 5.0) == capacity(512, 0.25, 5.0) < 300


def balanced(shards: int = 1) -> Layer:
    """Attention takes as long as the experts of all rows, where there are many."""
    return Layer(weight_bytes=20e6, state_bytes=0.0, expert_bytes=2e6, held=32 / shards, visited=10 / shards)


def test_two_micro_batches_are_worth_most_where_both_ends_are_as_busy() -> None:
    load = load_of(1, 1, 64)
    gains = [
        cut_gain(replace(balanced(), weight_bytes=weight), "broadcast", load, MEMORY, ZEN)
        for weight in (2e5, 2e6, 2e7, 2e8, 2e9)
    ]
    assert gains.index(max(gains)) == 2
    assert 1.2 < max(gains) < 2.0 / ZEN.beside
    assert gains[0] < 1.1
    assert gains[-1] < 1.1


def test_a_row_or_two_are_not_cut_where_weights_are_read_twice_for_it() -> None:
    attention = Layer(weight_bytes=200e6, state_bytes=0.0, expert_bytes=1e3, held=512, visited=10)
    for rows in (1, 2, 4):
        assert cut_gain(attention, "broadcast", load_of(1, 1, rows), MEMORY, ZEN) < 1.0


@pytest.mark.parametrize("most", [0, 1, 2, 47, 1000])
def test_what_is_cut_is_worth_it_up_to_the_most(most: int) -> None:
    rows = cut_rows(balanced(), "broadcast", load_of(1, 1), MEMORY, ZEN, most)
    assert all(2 <= count <= most for count in rows)
    assert all(cut_gain(balanced(), "broadcast", load_of(1, 1, count), MEMORY, ZEN) > 1.05 for count in rows)
    if most >= 47:
        assert rows.stop == most + 1
