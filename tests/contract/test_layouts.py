"""Any number of virtual shards, served by anybody: the sums of one process, bit for bit."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from divisi.cluster.dispatch.micro_batches import MicroBatches
from divisi.cluster.dispatch.protocol import Peers
from divisi.cluster.dispatch.wire import Transport, WireFormat
from divisi.cluster.seats import GangShape
from divisi.model.placement import VIRTUAL_SHARDS, Layout, deal, share_of
from tests.contract.topologies import CHOSEN, WIDTH, Batch, Topology, peers_of
from tests.support.gangs import CPU, DenseExperts, full_pass, gang_groups, serving_shards

EXPERTS, VACANT = 40, 2
COUNTS = [(3, 1), (20, 0), (1, 33), (20, 20)]
"""Rows of each worker, by pass; of the last all go to one expert."""
WIDE = [(1, 1), (1, 2), (2, 2), (1, 4), (2, 4), (1, 8), (2, 8)]

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
each_mode = pytest.mark.parametrize("mode", ["split", "all_to_all"])


@each_dtype
@each_mode
@pytest.mark.parametrize(
    ("workers", "shards"), [pytest.param(*s, marks=() if s == (2, 8) else pytest.mark.verify) for s in WIDE]
)
@pytest.mark.parametrize("leaves", ["default", "4E"])
def test_any_number_of_virtual_shards(workers: int, shards: int, mode: str, leaves: str, dtype: torch.dtype) -> None:
    """Empty, uneven and overflowing counts: the sums of `local` with as many, bit for bit."""
    virtual = VIRTUAL_SHARDS if leaves == "default" else 4 * shards
    check_sums(mode, workers, shards, virtual, dtype, None)


@each_dtype
@each_mode
@pytest.mark.parametrize(
    ("shards", "leaves"),
    [
        pytest.param(shards, leaves, marks=() if (shards, leaves) == (3, "default") else pytest.mark.verify)
        for shards in range(1, 9)
        for leaves in ("default", "4E")
    ],
)
def test_any_layout(shards: int, leaves: str, mode: str, dtype: torch.dtype) -> None:
    """Shares that are uneven and in pieces, on some of the gang's seats; the others have no rank."""
    virtual = VIRTUAL_SHARDS if leaves == "default" else 4 * shards
    for seed in range(2):
        check_sums(mode, 1 + seed, shards + VACANT, virtual, dtype, any_layout(virtual, shards, seed))


def any_layout(leaves: int, serving: int, seed: int) -> Layout:
    """Seats that serve nothing are among those that do, some of which serve much more than others."""
    rng = random.Random(100 * serving + seed)
    seats = rng.sample(range(serving + VACANT), serving)
    first = dict(zip(rng.sample(range(leaves), serving), seats, strict=True))
    weights = [rng.choice((1, 2, 6)) for _ in seats]
    server = [first.get(leaf) if leaf in first else rng.choices(seats, weights)[0] for leaf in range(leaves)]
    served = (tuple(leaf for leaf in range(leaves) if server[leaf] == seat) for seat in range(serving + VACANT))
    return Layout(leaves, tuple(served))


def check_sums(mode: str, workers: int, shards: int, virtual: int, dtype: torch.dtype, layout: Layout | None) -> None:
    shape, topology = GangShape(workers, shards), Topology(mode, GangShape(workers, shards), spare=1.0)
    weights = torch.randn(1, EXPERTS, WIDTH, WIDTH, generator=torch.Generator().manual_seed(3)) / WIDTH**0.5
    transport = Transport(WireFormat(WIDTH, CHOSEN, dtype, virtual), 64, 10.0, CPU, torch.float32)
    whole = DenseExperts(weights, deal(EXPERTS, 1, virtual)[0])
    counts = COUNTS[: None if workers == 2 else 3]
    batches = make_batches(workers, counts)
    passes = [full_pass(*row[:workers]) for row in counts]
    served = (layout or Layout.even(virtual, shards)).served
    with gang_groups(shape, layout=layout) as groups:
        peers = peers_of(shape, groups, layout)
        with (
            serving_shards(
                peers[workers:],
                MicroBatches(topology.sharded_mode(transport)),
                lambda shard: DenseExperts(weights, share_of(EXPERTS, virtual, served[shard])),
                [[step_pass] for step_pass in passes for _ in range(2)],
                range(1),
            ),
            ThreadPoolExecutor(workers) as pool,
        ):

            def run(each: Peers) -> None:
                end = MicroBatches(topology.sharded_mode(transport)).worker_end(each)
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


def make_batches(workers: int, counts: list[tuple[int, int]]) -> list[list[Batch | None]]:
    """What each worker brings, by pass."""
    rng = torch.Generator().manual_seed(9)

    def batch(rows: int, *, crowded: bool) -> Batch:
        ids_TK = torch.rand(rows, EXPERTS, generator=rng).argsort(dim=1)[:, :CHOSEN].int().contiguous()
        x_TD, gates_TK = torch.randn(rows, WIDTH, generator=rng), torch.rand(rows, CHOSEN, generator=rng)
        return x_TD, torch.zeros_like(ids_TK) if crowded else ids_TK, gates_TK

    return [[batch(row[w], crowded=i == 3) if row[w] else None for w in range(workers)] for i, row in enumerate(counts)]
