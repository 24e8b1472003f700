"""Peers that are silent, gone or slow: a step is aborted or waits, and nothing is mixed up."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from divisi.cluster.dispatch.colocated import ColocatedEnd
from divisi.cluster.dispatch.protocol import Peers, WorkerEnd
from divisi.cluster.dispatch.transport.groups import PeerGroup
from divisi.cluster.dispatch.transport.host_memory import HostMemory
from divisi.cluster.errors import StepAborted
from divisi.cluster.passes import Pass
from tests.contract.topologies import (
    COLOCATED,
    SIZES,
    Topology,
    each_mode,
    expected,
    expert_ranks,
    make_batch,
    make_experts,
    make_steps,
    make_transport,
    peers_of,
    run_all,
    run_worker,
)
from tests.support.gangs import SHARED, full_pass, gang_groups


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
