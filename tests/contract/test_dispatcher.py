"""What every dispatcher must do, whatever carries the tokens: one suite for local and broadcast."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from divisi.cluster.dispatch.broadcast import BroadcastDispatcher
from divisi.cluster.dispatch.local import LocalDispatcher
from divisi.cluster.dispatch.wire import WireFormat
from divisi.cluster.errors import StepAborted
from divisi.cluster.gang.seats import GangShape
from divisi.model.dispatcher import Dispatcher
from tests.support.gangs import CPU, DenseExperts, gang_groups, serving_shards, split

LAYERS, EXPERTS, WIDTH, CHOSEN = 3, 7, 24, 3
TOPOLOGIES = [None, (1, 1), (1, 2), (2, 2), (1, 3)]
Batch = tuple[Tensor, Tensor, Tensor]


def make_weights() -> Tensor:
    return torch.randn(LAYERS, EXPERTS, WIDTH, WIDTH, generator=torch.Generator().manual_seed(1)) / WIDTH**0.5


def make_batch(num_tokens: int, seed: int, only_expert: int | None = None) -> Batch:
    rng = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(num_tokens, WIDTH, generator=rng)
    ids_TK = torch.rand(num_tokens, EXPERTS, generator=rng).argsort(dim=1)[:, :CHOSEN].to(torch.int32).contiguous()
    gates_TK = torch.rand(num_tokens, CHOSEN, generator=rng)
    if only_expert is not None:
        ids_TK.fill_(only_expert)
    return x_TD, ids_TK, gates_TK


def run_worker(dispatcher: Dispatcher, batches: Sequence[Batch | None]) -> list[Tensor]:
    """All layers of each step that the worker takes part in; the sums, one after another."""
    sums = []
    for batch in batches:
        if batch is None:
            continue
        for layer in range(LAYERS):
            inputs = [tensor.clone() for tensor in batch]
            pending = dispatcher.dispatch(layer, *inputs)
            sums.append(pending.combine().clone())
    return sums


def run_all(
    topology: tuple[int, int] | None, dtype: torch.dtype, per_worker: Sequence[Sequence[Batch | None]]
) -> list[list[Tensor]]:
    """The sums of each worker. `per_worker[w][s]` is what worker w brings to step s, None for no tokens."""
    weights = make_weights()
    if topology is None:
        everything = DenseExperts(weights, frozenset(range(EXPERTS)))
        return [run_worker(LocalDispatcher(everything), batches) for batches in per_worker]
    shape = GangShape(*topology)
    wire = WireFormat(WIDTH, CHOSEN, dtype)
    shares = split(EXPERTS, shape.expert_shards)
    steps = [[0 if b is None else len(b[0]) for b in step] for step in zip(*per_worker, strict=True)]
    steps = [counts for counts in steps if any(counts)]

    def experts(shard: int) -> DenseExperts:
        return DenseExperts(weights, shares[shard])

    with (
        gang_groups(shape) as groups,
        serving_shards(shape, groups, wire, experts, steps, range(LAYERS)),
        ThreadPoolExecutor(len(per_worker)) as pool,
    ):
        dispatchers = [
            BroadcastDispatcher(groups[rank], shape.expert_ranks, wire, 64, 10.0, CPU) for rank in shape.attention_ranks
        ]
        return list(pool.map(run_worker, dispatchers, per_worker))


def expected(batches: Sequence[Batch | None]) -> list[Tensor]:
    dense = DenseExperts(make_weights(), frozenset(range(EXPERTS)))
    return [dense.partial_sum(layer, *b) for b in batches if b is not None for layer in range(LAYERS)]


def workers_of(topology: tuple[int, int] | None) -> int:
    return 1 if topology is None else topology[0]


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)], ids=str)
def test_sums_equal_the_dense_reference(topology: tuple[int, int] | None, dtype: torch.dtype, tolerance: float) -> None:
    sizes = [(1, 16), (7, 1), (16, 0), (0, 7), (1, 1)]
    per_worker = [
        [make_batch(row[w], seed=10 * s + w) if row[w] else None for s, row in enumerate(sizes)]
        for w in range(workers_of(topology))
    ]
    for got, batches in zip(run_all(topology, dtype, per_worker), per_worker, strict=True):
        want = expected(batches)
        assert len(got) == len(want)
        for y_TD, reference_TD in zip(got, want, strict=True):
            assert y_TD.dtype == torch.float32
            torch.testing.assert_close(y_TD, reference_TD, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=str)
@pytest.mark.parametrize("expert", [0, EXPERTS - 1])
def test_all_tokens_to_one_expert(topology: tuple[int, int] | None, expert: int) -> None:
    per_worker = [[make_batch(16, seed=w, only_expert=expert)] for w in range(workers_of(topology))]
    for got, batches in zip(run_all(topology, torch.float32, per_worker), per_worker, strict=True):
        for y_TD, reference_TD in zip(got, expected(batches), strict=True):
            torch.testing.assert_close(y_TD, reference_TD, atol=1e-5, rtol=1e-5)


def test_partial_sums_are_added_in_shard_order() -> None:
    """Bit for bit, however fast the shards are."""
    runs = [run_all((1, 3), torch.float32, [[make_batch(16, seed=5)]])[0] for _ in range(3)]
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("fault", ["silent", "gone"])
def test_a_shard_that_does_not_answer_aborts_the_step(fault: str) -> None:
    shape, wire = GangShape(1, 2), WireFormat(WIDTH, CHOSEN, torch.float32)
    with gang_groups(shape) as groups:
        deadline_s = 0.3 if fault == "silent" else 30.0
        dispatcher = BroadcastDispatcher(groups[0], shape.expert_ranks, wire, 64, deadline_s, CPU)
        pending = dispatcher.dispatch(0, *make_batch(4, seed=0))
        if fault == "gone":
            groups[1].close()
        begin = time.monotonic()
        with pytest.raises(StepAborted, match="expert:0"):
            pending.combine()
        assert time.monotonic() - begin < 3
        groups[0].close()
        with pytest.raises(StepAborted):
            dispatcher.dispatch(0, *make_batch(4, seed=0))


def test_a_step_goes_on_in_the_next_epoch() -> None:
    shape, batch = GangShape(1, 2), make_batch(4, seed=0)
    wire = WireFormat(WIDTH, CHOSEN, torch.float32)
    with gang_groups(shape, epoch=1) as groups:
        groups[2].close()
        with pytest.raises(StepAborted):
            BroadcastDispatcher(groups[0], shape.expert_ranks, wire, 64, 1.0, CPU).dispatch(0, *batch).combine()
    (got,) = run_all((1, 2), torch.float32, [[batch]])
    assert len(got) == LAYERS


@pytest.mark.parametrize("num_tokens", [1, 16])
def test_round_trip_time(num_tokens: int, record_result: Callable[[str, object], None]) -> None:
    """Measured, with a bound only against stalls. Experts that do nothing; D = 512, bf16."""
    shape, wire, layers = GangShape(1, 1), WireFormat(512, 8, torch.bfloat16), range(200)

    class Nothing(DenseExperts):
        def partial_sum(self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor, gates_TK: Tensor) -> Tensor:
            return x_TD

    def experts(shard: int) -> DenseExperts:
        return Nothing(make_weights(), frozenset())

    x_TD, gates_TK = torch.randn(num_tokens, 512), torch.rand(num_tokens, 8)
    ids_TK = torch.zeros(num_tokens, 8, dtype=torch.int32)
    with gang_groups(shape) as groups, serving_shards(shape, groups, wire, experts, [[num_tokens]], layers):
        dispatcher = BroadcastDispatcher(groups[0], shape.expert_ranks, wire, 64, 10.0, CPU)
        times = []
        for layer in layers:
            begin = time.perf_counter()
            dispatcher.dispatch(layer, x_TD, ids_TK, gates_TK).combine()
            times.append(time.perf_counter() - begin)
    median_us = sorted(times)[len(times) // 2] * 1e6
    record_result(f"microseconds per layer, T={num_tokens}", round(median_us))
    assert median_us < 20_000
