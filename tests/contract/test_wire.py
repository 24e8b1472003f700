"""What rows cost on the way: memory, bytes and time, and what happens where there is no room."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from divisi.cluster.dispatch.broadcast import Broadcast
from divisi.cluster.dispatch.colocated import Colocated
from divisi.cluster.dispatch.protocol import Peers
from divisi.cluster.dispatch.transport.groups import PeerGroup, Transfer
from divisi.cluster.dispatch.transport.host_memory import HostMemory
from divisi.cluster.dispatch.wire import Transport, WireFormat
from divisi.cluster.errors import StepAborted
from divisi.cluster.passes import Pass, PassKind
from divisi.cluster.seats import GangShape
from divisi.model.placement import Layout, deal
from tests.contract.topologies import (
    EACH_MODE,
    EXPERTS,
    LAYERS,
    Topology,
    expected,
    make_batch,
    make_transport,
    make_weights,
    peers_of,
    run_worker,
    serving,
)
from tests.support.gangs import CPU, SHARED, DenseExperts, full_pass, gang_groups, serving_shards


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
    with gang_groups(shape, memory=HostMemory(transport.largest(Layout.even(32, shards)), 0.0)) as plain:
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
