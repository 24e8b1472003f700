"""What every way to carry rows must do: the sums of one process, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from divisi.cluster.dispatch.protocol import Peers
from divisi.cluster.dispatch.transport.groups import PeerGroup
from divisi.cluster.dispatch.transport.host_memory import HostMemory
from divisi.cluster.seats import GangShape
from tests.contract.topologies import (
    COLOCATED,
    EXACT,
    EXPERTS,
    QUICK,
    SIZES,
    SPLIT,
    Topology,
    each_mode,
    every_topology,
    expected,
    expert_ranks,
    make_batch,
    make_steps,
    mostly_verify,
    peers_of,
    run_all,
)
from tests.support.gangs import SHARED, DenseExperts


@every_topology
def test_sums_are_those_of_one_process_bit_for_bit(topology: Topology) -> None:
    check_sums(topology, torch.float32)


@mostly_verify
def test_sums_over_gloo(topology: Topology) -> None:
    check_sums(topology, torch.float32, memory=None)


@pytest.mark.parametrize(
    "topology",
    [pytest.param(t, marks=() if t in QUICK else pytest.mark.verify) for t in (*SPLIT, *EXACT, *COLOCATED)],
    ids=str,
)
def test_sums_over_a_bf16_wire(topology: Topology) -> None:
    """The same: x is rounded before, by who computes in bf16, and nothing is on the way."""
    check_sums(topology, torch.bfloat16)


def check_sums(topology: Topology, dtype: torch.dtype, memory: HostMemory | None = SHARED) -> None:
    per_worker = make_steps(topology.shape, SIZES)
    for got, batches in zip(run_all(topology, dtype, per_worker, memory=memory), per_worker, strict=True):
        want = expected(batches, dtype)
        assert len(got) == len(want)
        for y_TD, reference_TD in zip(got, want, strict=True):
            assert y_TD.dtype == torch.float32
            assert torch.equal(y_TD, reference_TD)


@mostly_verify
@pytest.mark.parametrize("expert", [0, EXPERTS - 1])
def test_all_tokens_to_one_expert(topology: Topology, expert: int) -> None:
    per_worker = [[make_batch(16, seed=w, only_expert=expert)] for w in range(topology.shape.attention_workers)]
    for got, batches in zip(run_all(topology, torch.float32, per_worker), per_worker, strict=True):
        for y_TD, reference_TD in zip(got, expected(batches), strict=True):
            torch.testing.assert_close(y_TD, reference_TD, atol=1e-5, rtol=1e-5)


@each_mode
def test_sums_do_not_depend_on_who_is_faster(topology: Topology) -> None:
    """Bit for bit, however fast the shards are."""
    per_worker = make_steps(topology.shape, [(16, 5, 3, 0)] * 3, seed=5)
    runs = [run_all(topology, torch.float32, per_worker) for _ in range(3)]
    for other in runs[1:]:
        for first, again in zip(runs[0], other, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_colocated_sums_are_those_of_as_many_shards_bit_for_bit(ranks: int, dtype: torch.dtype) -> None:
    together = Topology("colocated", GangShape(ranks, ranks, colocated=True))
    apart = Topology("split", GangShape(ranks, ranks))
    per_worker = make_steps(together.shape, SIZES, seed=3)
    for got, want in zip(run_all(together, dtype, per_worker), run_all(apart, dtype, per_worker), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def renumbered(shape: GangShape, groups: Sequence[PeerGroup]) -> list[Peers]:
    """The peers in the order of `peers_of`, their seats at other ranks: as where members come and go."""
    rank = [(3 * i + 1) % shape.size for i in range(shape.size)]
    workers = {seat: rank[seat] for seat in range(shape.attention_workers)}
    shards = {index: rank[at] for index, at in enumerate(expert_ranks(shape))}
    # Some other order than that of the seats, on which nothing may depend either.
    workers, shards = dict(reversed(workers.items())), dict(reversed(shards.items()))
    return [
        Peers(shape.seat(i).index, workers, shards, lambda _, i=i: groups[rank[i]])  # type: ignore[misc]
        for i in range(shape.size)
    ]


@pytest.mark.parametrize("shape", [GangShape(2, 3), GangShape(4, 4, colocated=True)], ids=str)
def test_rows_and_sums_go_by_seat_whatever_the_ranks(shape: GangShape, monkeypatch: pytest.MonkeyPatch) -> None:
    """With experts whose results show at which place of the batch a row was."""
    partial_sum = DenseExperts.partial_sum

    def with_place(self: DenseExperts, layer: int, x_TD: Tensor, expert_ids_TK: Tensor, gates_TK: Tensor) -> Tensor:
        return partial_sum(self, layer, x_TD, expert_ids_TK, gates_TK) + torch.arange(len(x_TD))[:, None]

    monkeypatch.setattr(DenseExperts, "partial_sum", with_place)
    topology = Topology("colocated" if shape.colocated else "split", shape)
    per_worker = make_steps(shape, SIZES, seed=11)
    plain, other = (run_all(topology, torch.float32, per_worker, seats=seats) for seats in (peers_of, renumbered))
    for want, got in zip(plain, other, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
