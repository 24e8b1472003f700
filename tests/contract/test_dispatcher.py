"""What every dispatcher must do, whatever carries the tokens: one suite for local, broadcast and colocated."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from divisi.cluster.dispatch.broadcast import BroadcastDispatcher
from divisi.cluster.dispatch.colocated import ColocatedDispatcher
from divisi.cluster.dispatch.groups import PeerGroup
from divisi.cluster.dispatch.local import LocalDispatcher
from divisi.cluster.dispatch.wire import WireFormat
from divisi.cluster.errors import StepAborted
from divisi.cluster.seats import GangShape
from divisi.model.dispatcher import Dispatcher
from tests.support.gangs import CPU, DenseExperts, gang_groups, serving_shards, split

LAYERS, EXPERTS, WIDTH, CHOSEN = 3, 7, 24, 3
LOCAL = GangShape(1, 0)
SPLIT = [GangShape(workers, shards) for workers in range(1, 5) for shards in range(1, 5)]
COLOCATED = [GangShape(ranks, ranks, colocated=True) for ranks in range(1, 5)]
Batch = tuple[Tensor, Tensor, Tensor]


def name_of(shape: GangShape) -> str:
    if shape == LOCAL:
        return "local"
    kind = "colocated" if shape.colocated else "split"
    return f"{kind}-{shape.attention_workers}x{shape.expert_shards}"


every_topology = pytest.mark.parametrize("shape", [LOCAL, *SPLIT, *COLOCATED], ids=name_of)
QUICK = [LOCAL, *(GangShape(a, e) for a, e in ((1, 1), (1, 3), (2, 2), (4, 4))), *COLOCATED]
mostly_verify = pytest.mark.parametrize(
    "shape",
    [pytest.param(s, marks=() if s in QUICK else pytest.mark.verify) for s in (LOCAL, *SPLIT, *COLOCATED)],
    ids=name_of,
)
# of each way to carry tokens, the smallest with peers
each_kind = pytest.mark.parametrize("shape", [GangShape(2, 2), GangShape(3, 3, colocated=True)], ids=name_of)


def make_weights() -> Tensor:
    return torch.randn(LAYERS, EXPERTS, WIDTH, WIDTH, generator=torch.Generator().manual_seed(1)) / WIDTH**0.5


def make_experts(shape: GangShape, shard: int) -> DenseExperts:
    shares = split(EXPERTS, max(shape.expert_shards, 1))
    return DenseExperts(make_weights(), shares[shard])


def make_batch(num_tokens: int, seed: int, only_expert: int | None = None) -> Batch:
    rng = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(num_tokens, WIDTH, generator=rng)
    ids_TK = torch.rand(num_tokens, EXPERTS, generator=rng).argsort(dim=1)[:, :CHOSEN].to(torch.int32).contiguous()
    gates_TK = torch.rand(num_tokens, CHOSEN, generator=rng)
    if only_expert is not None:
        ids_TK.fill_(only_expert)
    return x_TD, ids_TK, gates_TK


def make_dispatcher(
    shape: GangShape, rank: int, group: PeerGroup, dtype: torch.dtype = torch.float32, deadline_s: float = 10.0
) -> Dispatcher:
    """A worker's end, in the topology that the shape stands for."""
    wire = WireFormat(WIDTH, CHOSEN, dtype)
    if shape == LOCAL:
        return LocalDispatcher(make_experts(shape, 0))
    if shape.colocated:
        experts = make_experts(shape, rank)
        return ColocatedDispatcher(group, rank, shape.size, experts, wire, 64, deadline_s, CPU, torch.float32)
    return BroadcastDispatcher(group, shape.expert_ranks, wire, 64, deadline_s, CPU)


def run_worker(dispatcher: Dispatcher, batches: Sequence[Batch | None], steps: Sequence[Sequence[int]]) -> list[Tensor]:
    """All layers of each step; the sums, one after another. `steps` are the token counts of all workers."""
    sums = []
    for batch, counts in zip(batches, steps, strict=True):
        if isinstance(dispatcher, ColocatedDispatcher):
            dispatcher.begin_step(counts)
        for layer in range(LAYERS):
            if batch is not None:
                pending = dispatcher.dispatch(layer, *(tensor.clone() for tensor in batch))
                sums.append(pending.combine().clone())
            elif isinstance(dispatcher, ColocatedDispatcher):
                dispatcher.serve(layer)
    return sums


def run_all(
    shape: GangShape, dtype: torch.dtype, per_worker: Sequence[Sequence[Batch | None]], epoch: int = 1
) -> list[list[Tensor]]:
    """The sums of each worker. `per_worker[w][s]` is what worker w brings to step s, None for no tokens."""
    steps = [[0 if b is None else len(b[0]) for b in step] for step in zip(*per_worker, strict=True)]
    with (
        gang_groups(shape, epoch) as groups,
        serving(shape, groups, dtype, steps),
        ThreadPoolExecutor(len(per_worker)) as pool,
    ):
        dispatchers = [make_dispatcher(shape, rank, groups[rank], dtype) for rank in shape.attention_ranks]
        return list(pool.map(lambda d, batches: run_worker(d, batches, steps), dispatchers, per_worker))


@contextmanager
def serving(
    shape: GangShape, groups: Sequence[PeerGroup], dtype: torch.dtype, steps: Sequence[Sequence[int]]
) -> Iterator[None]:
    """The shards that are ranks of their own, if there are any; nobody sends them a step without tokens."""
    wire, real = WireFormat(WIDTH, CHOSEN, dtype), [counts for counts in steps if any(counts)]
    with serving_shards(shape, groups, wire, lambda shard: make_experts(shape, shard), real, range(LAYERS)):
        yield


def expected(batches: Sequence[Batch | None]) -> list[Tensor]:
    dense = DenseExperts(make_weights(), frozenset(range(EXPERTS)))
    return [dense.partial_sum(layer, *b) for b in batches if b is not None for layer in range(LAYERS)]


def make_steps(shape: GangShape, sizes: Sequence[Sequence[int]], seed: int = 0) -> list[list[Batch | None]]:
    """What each worker brings to each step; `sizes` are rows of four counts, one for each possible worker."""
    return [
        [make_batch(row[w], seed=seed + 10 * s + w) if row[w] else None for s, row in enumerate(sizes)]
        for w in shape.attention_ranks
    ]


# one token, primes, everybody, and nobody but one: whoever brings none serves or is left out
SIZES = [(1, 16, 3, 5), (7, 1, 0, 0), (16, 0, 0, 1), (1, 7, 1, 1), (1, 0, 0, 0)]


@every_topology
def test_sums_equal_the_dense_reference(shape: GangShape) -> None:
    check_sums(shape, torch.float32, 1e-5)


@mostly_verify
def test_sums_over_a_bf16_wire(shape: GangShape) -> None:
    check_sums(shape, torch.bfloat16, 5e-2)


def check_sums(shape: GangShape, dtype: torch.dtype, tolerance: float) -> None:
    per_worker = make_steps(shape, SIZES)
    for got, batches in zip(run_all(shape, dtype, per_worker), per_worker, strict=True):
        want = expected(batches)
        assert len(got) == len(want)
        for y_TD, reference_TD in zip(got, want, strict=True):
            assert y_TD.dtype == torch.float32
            torch.testing.assert_close(y_TD, reference_TD, atol=tolerance, rtol=tolerance)


@mostly_verify
@pytest.mark.parametrize("expert", [0, EXPERTS - 1])
def test_all_tokens_to_one_expert(shape: GangShape, expert: int) -> None:
    per_worker = [[make_batch(16, seed=w, only_expert=expert)] for w in shape.attention_ranks]
    for got, batches in zip(run_all(shape, torch.float32, per_worker), per_worker, strict=True):
        for y_TD, reference_TD in zip(got, expected(batches), strict=True):
            torch.testing.assert_close(y_TD, reference_TD, atol=1e-5, rtol=1e-5)


@each_kind
def test_partial_sums_are_added_in_shard_order(shape: GangShape) -> None:
    """Bit for bit, however fast the shards are."""
    per_worker = make_steps(shape, [(16, 5, 3, 0)] * 3, seed=5)
    runs = [run_all(shape, torch.float32, per_worker) for _ in range(3)]
    for other in runs[1:]:
        for first, again in zip(runs[0], other, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_colocated_sums_are_those_of_as_many_shards_bit_for_bit(ranks: int, dtype: torch.dtype) -> None:
    together, apart = GangShape(ranks, ranks, colocated=True), GangShape(ranks, ranks)
    per_worker = make_steps(together, SIZES, seed=3)
    for got, want in zip(run_all(together, dtype, per_worker), run_all(apart, dtype, per_worker), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def start_layer(shape: GangShape, dispatcher: Dispatcher, counts: Sequence[int]) -> Callable[[], object]:
    """Dispatch a layer's tokens of worker 0 in a step of these counts; returns what ends the layer."""
    if isinstance(dispatcher, ColocatedDispatcher):
        dispatcher.begin_step(counts)
        if not counts[0]:
            return lambda: dispatcher.serve(0)
    return dispatcher.dispatch(0, *make_batch(counts[0], seed=0)).combine


@each_kind
@pytest.mark.parametrize("fault", ["silent", "gone before dispatch", "gone before combine"])
def test_a_peer_that_does_not_answer_aborts_the_step(shape: GangShape, fault: str) -> None:
    with gang_groups(shape) as groups:
        dispatcher = make_dispatcher(shape, 0, groups[0], deadline_s=0.3 if fault == "silent" else 30.0)
        lost = next(rank for rank in shape.expert_ranks if rank)
        counts = (4,) + (2,) * (shape.attention_workers - 1)
        begin = time.monotonic()

        def run_layer() -> None:
            if fault == "gone before dispatch":
                groups[lost].close()
            finish = start_layer(shape, dispatcher, counts)
            if fault == "gone before combine":
                groups[lost].close()
            finish()

        with pytest.raises(StepAborted, match=str(shape.seat(lost))):
            run_layer()
        assert time.monotonic() - begin < 3
        groups[0].close()
        with pytest.raises(StepAborted):
            run_layer()


@pytest.mark.parametrize("fault", ["silent", "gone"])
def test_a_colocated_rank_without_tokens_notices_a_lost_peer(fault: str) -> None:
    shape = GangShape(2, 2, colocated=True)
    with gang_groups(shape) as groups:
        dispatcher = make_dispatcher(shape, 0, groups[0], deadline_s=0.3 if fault == "silent" else 30.0)
        if fault == "gone":
            groups[1].close()
        begin = time.monotonic()
        with pytest.raises(StepAborted, match="attention:1"):
            start_layer(shape, dispatcher, (0, 5))()
        assert time.monotonic() - begin < 3


@each_kind
def test_a_step_goes_on_in_the_next_epoch_and_hears_nothing_of_the_last(shape: GangShape) -> None:
    """Messages of a broken step were sent and never received: they must not be taken for those of the next."""
    with gang_groups(shape, epoch=1) as groups:
        stale = make_dispatcher(shape, 0, groups[0], deadline_s=1.0)
        finish = start_layer(shape, stale, (4,) + (2,) * (shape.attention_workers - 1))
        groups[next(rank for rank in shape.expert_ranks if rank)].close()
        with pytest.raises(StepAborted):
            finish()
        per_worker = make_steps(shape, SIZES, seed=7)
        for got, batches in zip(run_all(shape, torch.float32, per_worker, epoch=2), per_worker, strict=True):
            for y_TD, reference_TD in zip(got, expected(batches), strict=True):
                torch.testing.assert_close(y_TD, reference_TD, atol=1e-5, rtol=1e-5)


def test_a_slow_rank_is_waited_for_and_changes_nothing() -> None:
    """Ranks that come to a layer at different times, in every order, over many layers: no deadlock, no mix-up."""
    shape = GangShape(4, 4, colocated=True)
    sizes = [tuple(3 if (step + w) % 3 else 0 for w in range(4)) for step in range(12)]
    per_worker = make_steps(shape, sizes, seed=20)
    steps = [list(row) for row in sizes]

    class Sleepy(ColocatedDispatcher):
        """Comes late to every layer, by a time of its own."""

        delay_s = 0.0

        def finish(self, layer: int, requests: Sequence[object]) -> list[Tensor]:
            time.sleep(self.delay_s)
            return super().finish(layer, requests)  # type: ignore[arg-type]

    def run(rank: int, group: PeerGroup) -> list[Tensor]:
        wire = WireFormat(WIDTH, CHOSEN, torch.float32)
        sleepy = Sleepy(group, rank, 4, make_experts(shape, rank), wire, 64, 10.0, CPU, torch.float32)
        sleepy.delay_s = 0.003 * ((rank * 7) % 4)
        return run_worker(sleepy, per_worker[rank], steps)

    with gang_groups(shape) as groups, ThreadPoolExecutor(4) as pool:
        for got, batches in zip(pool.map(run, range(4), groups), per_worker, strict=True):
            for y_TD, reference_TD in zip(got, expected(batches), strict=True):
                torch.testing.assert_close(y_TD, reference_TD, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("num_tokens", [1, 16])
@pytest.mark.parametrize("colocated", [False, True], ids=["split", "colocated"])
def test_round_trip_time(num_tokens: int, colocated: bool, record_result: Callable[[str, object], None]) -> None:
    """Measured, with a bound only against stalls. Experts that do nothing; D = 512, bf16; two ranks."""
    wire, layers = WireFormat(512, 8, torch.bfloat16), range(200)

    class Nothing(DenseExperts):
        def partial_sum(self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor, gates_TK: Tensor) -> Tensor:
            return x_TD

    nothing = Nothing(make_weights(), frozenset())
    shape = GangShape(2, 2, colocated=True) if colocated else GangShape(1, 1)
    x_TD, gates_TK = torch.randn(num_tokens, 512), torch.rand(num_tokens, 8)
    ids_TK = torch.zeros(num_tokens, 8, dtype=torch.int32)
    counts = [num_tokens] * shape.attention_workers

    def run(rank: int) -> list[float]:
        dispatcher: Dispatcher
        if colocated:
            dispatcher = ColocatedDispatcher(groups[rank], rank, 2, nothing, wire, 64, 10.0, CPU, torch.float32)
            dispatcher.begin_step(counts)
        else:
            dispatcher = BroadcastDispatcher(groups[rank], shape.expert_ranks, wire, 64, 10.0, CPU)
        times = []
        for layer in layers:
            begin = time.perf_counter()
            dispatcher.dispatch(layer, x_TD, ids_TK, gates_TK).combine()
            times.append(time.perf_counter() - begin)
        return times

    with (
        gang_groups(shape) as groups,
        serving_shards(shape, groups, wire, lambda shard: nothing, [counts], layers),
        ThreadPoolExecutor(2) as pool,
    ):
        times = next(pool.map(run, shape.attention_ranks))
    median_us = sorted(times)[len(times) // 2] * 1e6
    record_result(f"microseconds per layer, T={num_tokens}", round(median_us))
    assert median_us < 20_000
