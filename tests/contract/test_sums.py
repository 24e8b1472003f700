"""What every way to carry rows must do: the sums of one process, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from divisi.cluster.dispatch.groups import PeerGroup
from divisi.cluster.dispatch.host_memory import HostMemory
from divisi.cluster.dispatch.protocol import Peers
from divisi.cluster.dispatch.wire import Transport, WireFormat
from divisi.cluster.seats import GangShape
from divisi.model.placement import VIRTUAL_SHARDS, deal
from tests.contract.topologies import (
    CHOSEN,
    COLOCATED,
    EXACT,
    EXPERTS,
    QUICK,
    SIZES,
    SPLIT,
    WIDTH,
    Batch,
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
from tests.support.gangs import CPU, SHARED, DenseExperts, full_pass, gang_groups, serving_shards


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


WIDE = [(1, 1), (1, 2), (2, 2), (1, 4), (2, 4), (1, 8), (2, 8)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["split", "all_to_all"])
@pytest.mark.parametrize(
    ("workers", "shards"), [pytest.param(*s, marks=() if s == (2, 8) else pytest.mark.verify) for s in WIDE]
)
@pytest.mark.parametrize("leaves", ["default", "4E"])
def test_any_number_of_virtual_shards(workers: int, shards: int, mode: str, leaves: str, dtype: torch.dtype) -> None:
    """Empty, uneven and overflowing counts: the sums of `local` with as many, bit for bit."""
    experts, virtual = 40, VIRTUAL_SHARDS if leaves == "default" else 4 * shards
    shape, topology = GangShape(workers, shards), Topology(mode, GangShape(workers, shards), spare=1.0)
    weights = torch.randn(1, experts, WIDTH, WIDTH, generator=torch.Generator().manual_seed(3)) / WIDTH**0.5
    transport = Transport(WireFormat(WIDTH, CHOSEN, dtype, virtual), 64, 10.0, CPU, torch.float32)
    whole = DenseExperts(weights, deal(experts, 1, virtual)[0])
    counts = [(3, 1), (20, 0), (1, 33), (20, 20)][: None if workers == 2 else 3]
    rng = torch.Generator().manual_seed(9)

    def batch(rows: int, *, crowded: bool) -> Batch:
        ids_TK = torch.rand(rows, experts, generator=rng).argsort(dim=1)[:, :CHOSEN].int().contiguous()
        x_TD, gates_TK = torch.randn(rows, WIDTH, generator=rng), torch.rand(rows, CHOSEN, generator=rng)
        return x_TD, torch.zeros_like(ids_TK) if crowded else ids_TK, gates_TK

    batches = [
        [batch(row[w], crowded=i == 3) if row[w] else None for w in range(workers)] for i, row in enumerate(counts)
    ]
    passes = [full_pass(*row[:workers]) for row in counts]
    with gang_groups(shape) as groups:
        peers = peers_of(shape, groups)
        shares = deal(experts, shards, virtual)
        steps = [[step_pass] for step_pass in passes for _ in range(2)]
        with (
            serving_shards(
                peers[workers:],
                topology.sharded_mode(transport),
                lambda shard: DenseExperts(weights, shares[shard]),
                steps,
                range(1),
            ),
            ThreadPoolExecutor(workers) as pool,
        ):

            def run(each: Peers) -> None:
                end = topology.worker_mode(0, transport).worker_end(each)
                for step_pass, of_workers in zip(passes, batches, strict=True):
                    own = of_workers[each.seat]
                    carried = []
                    for _ in range(2):  # who has not carried all does so the second time
                        end.begin(step_pass)
                        if own is None:
                            end.idle(0)
                            continue
                        y_TD = end.dispatch(0, *own).combine().clone()
                        if end.carried_all():
                            carried.append(y_TD)
                    if own is not None:
                        want_TD = whole.partial_sum(0, own[0].to(dtype), *own[1:])
                        assert carried
                        assert all(torch.equal(y_TD, want_TD) for y_TD in carried)

            list(pool.map(run, peers[:workers]))
