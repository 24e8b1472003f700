"""What every way to carry rows must do: one suite for local, broadcast and colocated, and for a mode of one's own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from divisi.cluster.dispatch.all_to_all import AllToAll
from divisi.cluster.dispatch.broadcast import Broadcast
from divisi.cluster.dispatch.colocated import Colocated, ColocatedEnd
from divisi.cluster.dispatch.groups import PeerGroup, Transfer
from divisi.cluster.dispatch.host_memory import HostMemory
from divisi.cluster.dispatch.local import Local
from divisi.cluster.dispatch.protocol import DispatchMode, Peers, ShardedMode, WorkerEnd
from divisi.cluster.dispatch.wire import Transport, WireFormat
from divisi.cluster.errors import StepAborted
from divisi.cluster.passes import Pass, PassKind
from divisi.cluster.seats import Address, GangShape
from divisi.model.placement import VIRTUAL_SHARDS, deal
from tests.support.gangs import CPU, SHARED, DenseExperts, full_pass, gang_groups, membership_of, serving_shards
from tests.support.plain_mode import Plain

LAYERS, EXPERTS, WIDTH, CHOSEN = 3, 7, 24, 3
Batch = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Topology:
    """A shape and the mode that is under test in it."""

    mode: str
    shape: GangShape
    spare: float = 100.0
    """Of all-to-all: how much room there is beyond the mean."""

    def __str__(self) -> str:
        return f"{self.mode}-{self.shape.attention_workers}x{self.shape.expert_shards}"

    def worker_mode(self, rank: int, transport: Transport) -> DispatchMode:
        if self.mode == "local":
            return Local(make_experts(self.shape, 0))
        if self.mode == "colocated":
            return Colocated(transport, make_experts(self.shape, rank))
        return self.sharded_mode(transport)

    def sharded_mode(self, transport: Transport) -> ShardedMode:
        if self.mode == "plain":
            return Plain(transport.wire.hidden_size, transport.wire.experts_per_token, transport.deadline_s, EXPERTS)
        if self.mode == "all_to_all":
            return AllToAll(transport, self.spare)
        return Broadcast(transport)


LOCAL = Topology("local", GangShape(1, 0))
SPLIT = [Topology("split", GangShape(workers, shards)) for workers in range(1, 5) for shards in range(1, 5)]
COLOCATED = [Topology("colocated", GangShape(ranks, ranks, colocated=True)) for ranks in range(1, 5)]
EXACT = [Topology("all_to_all", GangShape(a, e)) for a, e in ((1, 1), (1, 2), (1, 4), (1, 7), (2, 2), (2, 3), (2, 7))]
PLAIN = [Topology("plain", GangShape(workers, shards)) for workers, shards in ((1, 1), (2, 3))]
ALL = [LOCAL, *SPLIT, *EXACT, *COLOCATED, *PLAIN]

every_topology = pytest.mark.parametrize("topology", ALL, ids=str)
QUICK = [
    LOCAL,
    *(Topology("split", GangShape(a, e)) for a, e in ((1, 1), (1, 3), (2, 2), (4, 4))),
    *EXACT[2:],
    *COLOCATED,
    *PLAIN,
]
mostly_verify = pytest.mark.parametrize(
    "topology", [pytest.param(t, marks=() if t in QUICK else pytest.mark.verify) for t in ALL], ids=str
)
# of each way to carry rows, the smallest with peers
EACH_MODE = [
    Topology("split", GangShape(2, 2)),
    Topology("colocated", GangShape(3, 3, colocated=True)),
    Topology("all_to_all", GangShape(2, 2)),
    PLAIN[1],
]
each_mode = pytest.mark.parametrize("topology", EACH_MODE, ids=str)


def make_weights() -> Tensor:
    return torch.randn(LAYERS, EXPERTS, WIDTH, WIDTH, generator=torch.Generator().manual_seed(1)) / WIDTH**0.5


def make_experts(shape: GangShape, shard: int) -> DenseExperts:
    shares = deal(EXPERTS, max(shape.expert_shards, 1))
    return DenseExperts(make_weights(), shares[shard])


def make_batch(num_tokens: int, seed: int, only_expert: int | None = None) -> Batch:
    rng = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(num_tokens, WIDTH, generator=rng)
    ids_TK = torch.rand(num_tokens, EXPERTS, generator=rng).argsort(dim=1)[:, :CHOSEN].to(torch.int32).contiguous()
    gates_TK = torch.rand(num_tokens, CHOSEN, generator=rng)
    if only_expert is not None:
        ids_TK.fill_(only_expert)
    return x_TD, ids_TK, gates_TK


def make_transport(dtype: torch.dtype = torch.float32, deadline_s: float = 10.0) -> Transport:
    return Transport(WireFormat(WIDTH, CHOSEN, dtype, EXPERTS), 64, deadline_s, CPU, torch.float32)


def peers_of(shape: GangShape, groups: Sequence[PeerGroup]) -> list[Peers]:
    """By rank."""
    membership = membership_of(shape, Address("127.0.0.1"))
    return [Peers.of(membership, rank, lambda _, group=group: group) for rank, group in enumerate(groups)]  # type: ignore[misc]


def expert_ranks(shape: GangShape) -> range:
    """In shard order."""
    return range(shape.size) if shape.colocated else shape.shard_ranks


def run_worker(end: WorkerEnd, batches: Sequence[Batch | None], passes: Sequence[Pass]) -> list[Tensor]:
    """All layers of each pass; the sums, one after another. `batches` are what this worker brings to each."""
    sums = []
    for batch, step_pass in zip(batches, passes, strict=True):
        end.begin(step_pass)
        for layer in range(LAYERS):
            if batch is None:
                end.idle(layer)
            else:
                pending = end.dispatch(layer, *(tensor.clone() for tensor in batch))
                sums.append(pending.combine().clone())
    return sums


def run_all(
    topology: Topology,
    dtype: torch.dtype,
    per_worker: Sequence[Sequence[Batch | None]],
    epoch: int = 1,
    seats: Callable[[GangShape, Sequence[PeerGroup]], list[Peers]] = peers_of,
    memory: HostMemory | None = SHARED,
) -> list[list[Tensor]]:
    """The sums of each worker. `per_worker[w][s]` is what worker w brings to step s, None for no rows."""
    passes = [full_pass(*(0 if b is None else len(b[0]) for b in step)) for step in zip(*per_worker, strict=True)]
    transport, shape = make_transport(dtype), topology.shape
    with gang_groups(shape, epoch, memory) as groups:
        peers = seats(shape, groups)
        workers = peers[: shape.attention_workers]
        with serving(topology, peers, transport, passes), ThreadPoolExecutor(len(workers)) as pool:
            ends = [topology.worker_mode(each.seat, transport).worker_end(each) for each in workers]
            return list(pool.map(lambda end, batches: run_worker(end, batches, passes), ends, per_worker))


@contextmanager
def serving(topology: Topology, peers: Sequence[Peers], transport: Transport, passes: Sequence[Pass]) -> Iterator[None]:
    """The shards that are ranks of their own, if there are any."""
    shards = peers[topology.shape.attention_workers :]
    mode, steps = topology.sharded_mode(transport), [[step_pass] for step_pass in passes]
    with serving_shards(shards, mode, lambda shard: make_experts(topology.shape, shard), steps, range(LAYERS)):
        yield


def expected(batches: Sequence[Batch | None], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """What `local` gives for x in such a dtype."""
    dense = DenseExperts(make_weights(), deal(EXPERTS, 1)[0])
    rows = [(b[0].to(dtype), *b[1:]) for b in batches if b is not None]
    return [dense.partial_sum(layer, *b) for b in rows for layer in range(LAYERS)]


def make_steps(shape: GangShape, sizes: Sequence[Sequence[int]], seed: int = 0) -> list[list[Batch | None]]:
    """What each worker brings to each step; `sizes` are rows of four counts, one for each possible worker."""
    return [
        [make_batch(row[w], seed=seed + 10 * s + w) if row[w] else None for s, row in enumerate(sizes)]
        for w in range(shape.attention_workers)
    ]


# one token, primes, everybody, and nobody but one: whoever brings none serves or is left out
SIZES = [(1, 16, 3, 5), (7, 1, 0, 0), (16, 0, 0, 1), (1, 7, 1, 1), (1, 0, 0, 0)]


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


@pytest.mark.parametrize("topology", EACH_MODE[:2], ids=str)
def test_nothing_of_a_batch_is_allocated_in_a_layer(topology: Topology) -> None:
    """All of a layer's sums lie in the same memory, whatever the pass."""
    shape, transport = topology.shape, make_transport()
    passes = [full_pass(*[rows] * shape.attention_workers) for rows in (5, 9)]
    with gang_groups(shape) as groups:
        peers = peers_of(shape, groups)
        workers = peers[: shape.attention_workers]

        def run(each: Peers) -> set[int]:
            end, sums = topology.worker_mode(each.seat, transport).worker_end(each), []
            for step_pass in passes:
                end.begin(step_pass)
                batch = make_batch(step_pass.rows(each.seat), seed=each.seat)
                sums += [end.dispatch(layer, *batch).combine() for layer in range(LAYERS)]
            return {y_TD.data_ptr() for y_TD in sums}

        with serving(topology, peers, transport, passes), ThreadPoolExecutor(len(workers)) as pool:
            assert [len(places) for places in pool.map(run, workers)] == [1] * len(workers)


def start_layer(end: WorkerEnd, step_pass: Pass) -> Callable[[], object]:
    """Dispatch a layer's rows of worker 0 in such a pass; returns what ends the layer."""
    end.begin(step_pass)
    if not step_pass.rows(0):
        return lambda: end.idle(0)
    return end.dispatch(0, *make_batch(step_pass.rows(0), seed=0)).combine


def first_end(topology: Topology, groups: Sequence[PeerGroup], deadline_s: float) -> WorkerEnd:
    return topology.worker_mode(0, make_transport(deadline_s=deadline_s)).worker_end(
        peers_of(topology.shape, groups)[0]
    )


@each_mode
@pytest.mark.parametrize("memory", [SHARED, None], ids=["memory", "gloo"])
@pytest.mark.parametrize("fault", ["silent", "gone before dispatch", "gone before combine"])
def test_a_peer_that_does_not_answer_aborts_the_step(topology: Topology, fault: str, memory: HostMemory | None) -> None:
    shape = topology.shape
    with gang_groups(shape, memory=memory) as groups:
        end = first_end(topology, groups, deadline_s=0.3 if fault == "silent" else 30.0)
        lost = next(rank for rank in expert_ranks(shape) if rank)
        step_pass = full_pass(4, *[2] * (shape.attention_workers - 1))
        begin = time.monotonic()

        def run_layer() -> None:
            if fault == "gone before dispatch":
                groups[lost].close()
            finish = start_layer(end, step_pass)
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
def test_a_colocated_rank_without_rows_notices_a_lost_peer(fault: str) -> None:
    topology = COLOCATED[1]
    with gang_groups(topology.shape) as groups:
        end = first_end(topology, groups, deadline_s=0.3 if fault == "silent" else 30.0)
        if fault == "gone":
            groups[1].close()
        begin = time.monotonic()
        with pytest.raises(StepAborted, match="attention:1"):
            start_layer(end, full_pass(0, 5))()
        assert time.monotonic() - begin < 3


@each_mode
def test_a_step_goes_on_in_the_next_epoch_and_hears_nothing_of_the_last(topology: Topology) -> None:
    """Messages of a broken step were sent and never received: they must not be taken for those of the next."""
    shape = topology.shape
    with gang_groups(shape, epoch=1) as groups:
        stale = first_end(topology, groups, deadline_s=1.0)
        finish = start_layer(stale, full_pass(4, *[2] * (shape.attention_workers - 1)))
        groups[next(rank for rank in expert_ranks(shape) if rank)].close()
        with pytest.raises(StepAborted):
            finish()
        per_worker = make_steps(shape, SIZES, seed=7)
        for got, batches in zip(run_all(topology, torch.float32, per_worker, epoch=2), per_worker, strict=True):
            for y_TD, reference_TD in zip(got, expected(batches), strict=True):
                torch.testing.assert_close(y_TD, reference_TD, atol=1e-5, rtol=1e-5)


def test_a_slow_rank_is_waited_for_and_changes_nothing() -> None:
    """Ranks that come to a layer at different times, in every order, over many layers: no deadlock, no mix-up."""
    shape = COLOCATED[3].shape
    sizes = [tuple(3 if (step + w) % 3 else 0 for w in range(4)) for step in range(12)]
    per_worker = make_steps(shape, sizes, seed=20)
    passes = [full_pass(*row) for row in sizes]

    class Sleepy(ColocatedEnd):
        """Comes late to every layer, by a time of its own."""

        delay_s = 0.0

        def finish(self, layer: int, requests: Sequence[object]) -> None:
            time.sleep(self.delay_s)
            super().finish(layer, requests)  # type: ignore[arg-type]

    def run(peers: Peers) -> list[Tensor]:
        sleepy = Sleepy(peers, make_experts(shape, peers.seat), make_transport())
        sleepy.delay_s = 0.003 * ((peers.seat * 7) % 4)
        return run_worker(sleepy, per_worker[peers.seat], passes)

    with gang_groups(shape) as groups, ThreadPoolExecutor(4) as pool:
        for got, batches in zip(pool.map(run, peers_of(shape, groups)), per_worker, strict=True):
            for y_TD, reference_TD in zip(got, expected(batches), strict=True):
                torch.testing.assert_close(y_TD, reference_TD, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("num_tokens", [1, 16])
@pytest.mark.parametrize("memory", [SHARED, None], ids=["memory", "gloo"])
@pytest.mark.parametrize("colocated", [False, True], ids=["split", "colocated"])
def test_round_trip_time(
    num_tokens: int, colocated: bool, memory: HostMemory | None, record_result: Callable[[str, object], None]
) -> None:
    """Measured, with a bound only against stalls. Experts that do nothing; D = 512, bf16; two ranks."""
    transport = Transport(WireFormat(512, 8, torch.bfloat16, 32), 64, 10.0, CPU, torch.float32)
    layers = range(200)

    class Nothing(DenseExperts):
        def partial_sum(self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor, gates_TK: Tensor) -> Tensor:
            return x_TD.float()

    nothing = Nothing(make_weights(), deal(EXPERTS, 1)[0])
    shape = GangShape(2, 2, colocated=True) if colocated else GangShape(1, 1)
    mode = Colocated(transport, nothing) if colocated else Broadcast(transport)
    x_TD, gates_TK = torch.randn(num_tokens, 512), torch.rand(num_tokens, 8)
    ids_TK = torch.zeros(num_tokens, 8, dtype=torch.int32)
    step_pass = full_pass(*[num_tokens] * shape.attention_workers)

    def run(peers: Peers) -> list[float]:
        end = mode.worker_end(peers)
        end.begin(step_pass)
        times = []
        for layer in layers:
            begin = time.perf_counter()
            end.dispatch(layer, x_TD, ids_TK, gates_TK).combine()
            times.append(time.perf_counter() - begin)
        return times

    with gang_groups(shape, memory=memory) as groups:
        peers = peers_of(shape, groups)
        workers, shards = peers[: shape.attention_workers], peers[shape.attention_workers :]
        with (
            serving_shards(shards, Broadcast(transport), lambda shard: nothing, [[step_pass]], layers),
            ThreadPoolExecutor(2) as pool,
        ):
            times = next(pool.map(run, workers))
    median_us = sorted(times)[len(times) // 2] * 1e6
    record_result(f"microseconds per layer, T={num_tokens}", round(median_us))
    assert median_us < 20_000


def test_more_rows_than_there_is_room_for_end_the_epoch_and_not_the_rank() -> None:
    transport = Transport(WireFormat(8, 2, torch.float32, 4), 4, 1.0, CPU, torch.float32)
    transport.check(Pass(PassKind.FULL, {0: 4, 1: 4}))
    with pytest.raises(StepAborted, match="5 rows of one worker, and room is for 4"):
        transport.check(Pass(PassKind.FULL, {0: 4, 1: 5}))


@pytest.mark.parametrize("shape", [GangShape(1, 2), GangShape(2, 7)], ids=str)
def test_rows_beyond_the_room_make_a_step_that_does_not_count_and_the_next_one_has_room(shape: GangShape) -> None:
    """All-to-all with all rows to one expert: they are more than its shard is expected to get."""
    topology = Topology("all_to_all", shape, spare=0.0)
    rows, transport = 32, make_transport()
    batches = [make_batch(rows, seed=w, only_expert=3) for w in range(shape.attention_workers)]
    step_pass = full_pass(*[rows] * shape.attention_workers)
    with gang_groups(shape) as groups:
        peers = peers_of(shape, groups)
        workers = peers[: shape.attention_workers]

        def run(each: Peers) -> list[Tensor]:
            end = topology.worker_mode(each.seat, transport).worker_end(each)
            run_worker(end, [batches[each.seat]], [step_pass])
            assert not end.carried_all()
            sums = run_worker(end, [batches[each.seat]], [step_pass])
            assert end.carried_all()
            run_worker(end, [batches[each.seat]], [step_pass])
            assert not end.carried_all(), "only the step that is run again has room for all"
            return sums

        with serving(topology, peers, transport, [step_pass] * 3), ThreadPoolExecutor(len(workers)) as pool:
            for got, batch in zip(pool.map(run, workers), batches, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(got, expected([batch]), strict=True))


class Counting:
    """A group that counts bytes."""

    def __init__(self, group: PeerGroup) -> None:
        self._group, self.bytes = group, 0

    def send(self, data: Tensor, rank: int) -> Transfer:
        self.bytes += data.numel()
        return self._group.send(data, rank)

    def recv(self, data: Tensor, rank: int) -> Transfer:
        return self._group.recv(data, rank)

    def close(self) -> None:
        self._group.close()


@pytest.mark.parametrize("mode", ["split", "all_to_all"])
@pytest.mark.parametrize("shards", [2, 4, 8])
def test_bytes_on_the_wire(mode: str, shards: int, record_result: Callable[[str, object], None]) -> None:
    """Against a row out and one back for each shard that a row visits, in their dtypes; rows of the 80 B model."""
    width, chosen, experts, rows = 2048, 10, 512, 64
    transport = Transport(WireFormat(width, chosen, torch.bfloat16, 32), rows, 10.0, CPU, torch.float32)
    shape, rng = GangShape(1, shards), torch.Generator().manual_seed(4)
    x_TD, gates_TK = torch.randn(rows, width, generator=rng), torch.rand(rows, chosen, generator=rng)
    ids_TK = torch.rand(rows, experts, generator=rng).argsort(dim=1)[:, :chosen].int().contiguous()

    class Nothing(DenseExperts):
        def partial_sum(self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor, gates_TK: Tensor) -> Tensor:
            return x_TD

    step_pass, topology = full_pass(rows), Topology(mode, shape)
    with gang_groups(shape, memory=HostMemory(transport.largest(shards), 0.0)) as plain:
        groups = [Counting(group) for group in plain]
        peers = peers_of(shape, groups)
        shares = deal(experts, shards)
        with serving_shards(
            peers[1:], topology.sharded_mode(transport), lambda s: Nothing(x_TD, shares[s]), [[step_pass]], range(1)
        ):
            end = topology.worker_mode(0, transport).worker_end(peers[0])
            end.begin(step_pass)
            end.dispatch(0, x_TD, ids_TK, gates_TK).combine()
    visits = sum(len({e % 32 * shards // 32 for e in ids}) for ids in ids_TK.tolist())
    moved = sum(group.bytes for group in groups)
    record_result(f"{mode}, {shards} shards: bytes : a row out and one back", round(moved / (visits * 6 * width), 3))
    record_result(f"{mode}, {shards} shards: bytes : bf16 both ways", round(moved / (visits * 4 * width), 3))
    if mode == "all_to_all":
        assert moved / (visits * 6 * width) <= 1.05


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
