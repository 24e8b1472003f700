"""Passes in two micro-batches: the sums of one, bit for bit, with both under way at once."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from divisi.cluster.dispatch.micro_batches import MicroBatches
from divisi.cluster.dispatch.protocol import Peers, WorkerEnd
from divisi.cluster.dispatch.transport.host_memory import HostMemory
from divisi.cluster.errors import StepAborted
from divisi.cluster.passes import Pass, PassKind
from divisi.cluster.seats import GangShape
from tests.contract.topologies import (
    LAYERS,
    Batch,
    Topology,
    expected,
    make_batch,
    make_experts,
    make_transport,
    peers_of,
)
from tests.support.gangs import SHARED, gang_groups, serving_shards

SHAPES = [GangShape(workers, shards) for workers, shards in ((1, 1), (1, 2), (2, 2), (2, 7))]
# by pass, of each worker: all rows, and those of the second micro-batch; both, one of them, nobody, uneven halves
COUNTS = [((8, 4), (6, 3)), ((5, 1), (2, 0)), ((3, 0), (4, 0)), ((0, 0), (9, 8)), ((2, 1), (0, 0))]
each_way = pytest.mark.parametrize("memory", [SHARED, None], ids=["memory", "gloo"])
each_mode = pytest.mark.parametrize("mode", ["split", "all_to_all"])


def halves_of(counts: tuple[int, int], seed: int) -> list[Batch]:
    """The rows of each micro-batch that has any."""
    rows, second = counts
    whole = make_batch(rows, seed) if rows else ()
    cut = [slice(0, rows - second), slice(rows - second, rows)]
    return [tuple(tensor[part] for tensor in whole) for part in cut if part.start < part.stop]  # type: ignore[misc]


def walk(end: WorkerEnd, step_pass: Pass, halves: Sequence[Batch]) -> list[list[Tensor]]:
    """As the model walks: a half is combined once the other one is on its way. The sums, by half and layer."""
    end.begin(step_pass)
    sums: list[list[Tensor]] = [[] for _ in halves]
    pending = [end.dispatch(0, *half) for half in halves]
    for layer in range(1, LAYERS + 1):
        for at, half in enumerate(halves):
            sums[at].append(pending[at].combine().clone())
            if layer < LAYERS:
                pending[at] = end.dispatch(layer, *half)
    if not halves:
        for layer in range(LAYERS):
            end.idle(layer)
    return sums


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@each_mode
@each_way
def test_sums_are_those_of_one_micro_batch(
    shape: GangShape, mode: str, memory: HostMemory | None, dtype: torch.dtype
) -> None:
    workers, topology, transport = shape.attention_workers, Topology(mode, shape), make_transport(dtype)
    counts = [of_pass for of_pass in COUNTS if sum(rows for rows, _ in of_pass[:workers])]
    passes = [
        Pass(
            PassKind.FULL,
            {seat: rows for seat, (rows, _) in enumerate(of_pass[:workers]) if rows},
            {seat: second for seat, (_, second) in enumerate(of_pass[:workers]) if second},
        )
        for of_pass in counts
    ]
    with gang_groups(shape, memory=memory) as groups:
        peers, cut = peers_of(shape, groups), MicroBatches(topology.sharded_mode(transport))

        def run(each: Peers) -> None:
            end = cut.worker_end(each)
            for number, (step_pass, of_pass) in enumerate(zip(passes, counts, strict=True)):
                halves = halves_of(of_pass[each.seat], seed=10 * number + each.seat)
                for half, sums in zip(halves, walk(end, step_pass, halves), strict=True):
                    want = expected([half], dtype)
                    assert all(torch.equal(got, wanted) for got, wanted in zip(sums, want, strict=True))
                assert end.carried_all()

        steps = [[step_pass] for step_pass in passes]
        with (
            serving_shards(peers[workers:], cut, lambda s: make_experts(shape, s), steps, range(LAYERS)),
            ThreadPoolExecutor(workers) as pool,
        ):
            list(pool.map(run, peers[:workers]))


@each_mode
@each_way
@pytest.mark.parametrize("fault", ["silent", "gone"])
def test_a_shard_that_is_lost_between_two_halves_aborts_the_step(
    mode: str, memory: HostMemory | None, fault: str
) -> None:
    shape = GangShape(1, 1)
    with gang_groups(shape, memory=memory) as groups:
        transport = make_transport(deadline_s=0.3 if fault == "silent" else 30.0)
        end = MicroBatches(Topology(mode, shape).sharded_mode(transport)).worker_end(peers_of(shape, groups)[0])
        end.begin(Pass(PassKind.FULL, {0: 4}, {0: 2}))
        begin = time.monotonic()

        def run_layer() -> None:
            first, second = (end.dispatch(0, *half) for half in halves_of((4, 2), 0))
            if fault == "gone":
                groups[1].close()
            first.combine()
            second.combine()

        with pytest.raises(StepAborted, match="expert:0"):
            run_layer()
        assert time.monotonic() - begin < 3


def test_rows_beyond_the_room_of_either_half_make_a_step_that_does_not_count() -> None:
    """All-to-all whose second half goes to one expert; run again, it has room, and the first still has."""
    shape, transport = GangShape(1, 2), make_transport()
    cut = MicroBatches(Topology("all_to_all", shape, spare=0.0).sharded_mode(transport))
    halves = [make_batch(1, seed=1), make_batch(32, seed=2, only_expert=3)]
    step_pass = Pass(PassKind.FULL, {0: 33}, {0: 32})
    with gang_groups(shape) as groups:
        peers = peers_of(shape, groups)
        steps = [[step_pass]] * 2
        with serving_shards(peers[1:], cut, lambda s: make_experts(shape, s), steps, range(LAYERS)):
            end = cut.worker_end(peers[0])
            walk(end, step_pass, halves)
            assert not end.carried_all()
            sums = walk(end, step_pass, halves)
            assert end.carried_all()
    for half, of_half in zip(halves, sums, strict=True):
        assert all(torch.equal(got, want) for got, want in zip(of_half, expected([half]), strict=True))
