"""A whole gang over a checkpoint in one process: real loops, sockets and gloo groups, one thread per rank."""

from __future__ import annotations

import contextlib
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from divisi.cluster.assembly import dispatch_mode, sharded_mode, transport
from divisi.cluster.attention_rank import AttentionRank
from divisi.cluster.dispatch.meter import MeteredExperts
from divisi.cluster.dispatch.protocol import AllExperts, DispatchMode, ShardedMode
from divisi.cluster.dispatch.transport.rendezvous import StoreServer
from divisi.cluster.dispatch.wire import Transport
from divisi.cluster.errors import StepAborted
from divisi.cluster.expert_rank import ExpertRank
from divisi.cluster.gang.membership.coordinator import Coordinator
from divisi.cluster.post import Post
from divisi.cluster.request import Request, TokenEvent
from divisi.cluster.seats import GangShape
from divisi.cluster.spec import GangSpec
from divisi.cluster.telemetry.spec import TelemetrySpec
from divisi.model.config import ModelConfig
from tests.support.credentials import CREDENTIALS

HOST = "127.0.0.1"
NewMode = Callable[[Transport], ShardedMode]


def small_spec(path: Path, shape: GangShape, **changes: object) -> GangSpec:
    fields: dict[str, object] = {
        "name": "test",
        "model_dir": str(path),
        "dtype": "float32",
        "device": "cpu",
        "threads": 1,
        "kernels": "auto",
        "deterministic": False,
        "shape": shape,
        "max_model_len": 512,
        "kv_memory": 8 * 2**20,
        "page_size": 8,
        "max_seqs": 8,
        "max_step_tokens": 64 * shape.attention_workers,
        "step_deadline_s": 10.0,
        "telemetry": TelemetrySpec(scraped=False),
    }
    return GangSpec(**(fields | changes))  # type: ignore[arg-type]


def leaves_of(spec: GangSpec) -> int:
    """Into how many virtual shards its experts are cut."""
    return min(spec.virtual_shards, ModelConfig.load(spec.model_dir).num_experts)


def post_of(coordinator: Coordinator, process: str = "") -> Post:
    """Of a rank in this process."""
    return Post(HOST, CREDENTIALS.secret, lambda: coordinator, lambda who: contextlib.nullcontext(), process)


class Worker:
    """One attention worker, as its actor holds it; collects the events of its requests."""

    def __init__(self, spec: GangSpec, coordinator: Coordinator, new_mode: NewMode | None = None) -> None:
        def mode(spec: GangSpec, config: ModelConfig, experts: AllExperts | None) -> DispatchMode:
            return new_mode(transport(spec, config)) if new_mode else dispatch_mode(spec, config, experts)

        self.coordinator = coordinator
        self.rank = rank = AttentionRank(spec, post_of(coordinator), mode)
        self.engine, self.experts, self.loop = rank._engine, rank._experts, rank._loop
        self.watch, self._inbox, self._thread = rank._watch, rank._inbox, rank._thread
        self._changed = threading.Condition()
        self.events: dict[str, list[TokenEvent]] = defaultdict(list)
        self.loop._deliver = self._collect  # nothing is submitted yet

    def _collect(self, events: Sequence[TokenEvent]) -> None:
        with self._changed:
            for event in events:
                self.events[event.request_id].append(event)
            self._changed.notify_all()

    def tokens(self, request_id: str) -> list[int]:
        return [token for event in self.events[request_id] for token in event.token_ids]

    def wait_for_tokens(self, request_id: str, count: int, timeout: float = 60.0) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.tokens(request_id)) >= count, timeout)

    def finish(self, request_id: str, timeout: float = 60.0) -> list[int]:
        """Wait for the request's end; its tokens."""

        def ended() -> bool:
            events = self.events[request_id]
            return bool(events) and events[-1].finish_reason is not None

        with self._changed:
            assert self._changed.wait_for(ended, timeout), f"{request_id} has not ended: {self.events[request_id]}"
        return self.tokens(request_id)

    def submit(self, *requests: Request) -> None:
        for request in requests:
            self.loop.submit(request).result(timeout=30)

    def die_in_a_layer(self) -> None:
        """End the loop as soon as its experts are asked for, so that the peers wait for this rank in vain."""

        def last_call(*_: object) -> torch.Tensor:
            self._inbox.stop()
            raise StepAborted("died in a layer")

        assert self.experts is not None, "only a rank with experts"
        self.experts.partial_sum = last_call  # type: ignore[method-assign]
        self._thread.join(20)

    def leave(self) -> None:
        """As a worker does that is taken away."""
        self.watch.retire(20)
        self.close()

    def close(self) -> None:
        self.rank.close(retire_s=0.0)


class Shard:
    """One expert shard in a thread, as its actor holds it; a spare where it is created for no share."""

    def __init__(
        self, spec: GangSpec, index: int | None, coordinator: Coordinator, new_mode: NewMode | None = None
    ) -> None:
        def mode(spec: GangSpec, config: ModelConfig) -> ShardedMode:
            return new_mode(transport(spec, config)) if new_mode else sharded_mode(spec, config)

        process = "spare" if index is None else f"expert:{index}"
        self.rank = ExpertRank(spec, post_of(coordinator, process), index, mode)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def loaded(self, experts: MeteredExperts) -> None:
        """For tests that change what it serves."""

    def _run(self) -> None:
        while self.rank.load():
            assert self.rank.experts is not None
            self.loaded(self.rank.experts)
            self.rank.serve()

    def close(self) -> None:
        self.rank.close()
        self._thread.join(20)


def new_coordinator(spec: GangSpec, store: StoreServer, lease_s: float = 10.0, grace_s: float = 4.0) -> Coordinator:
    """As the actor makes it."""
    return Coordinator(
        spec.shape,
        store.address,
        lease_s,
        grace_s,
        min_attention_workers=spec.min_attention_workers,
        spec=spec.fingerprint,
        patience=spec.patience,
        virtual_shards=leaves_of(spec),
        copies=spec.expert_copies,
        rebalance=spec.rebalance,
        wait_rule=spec.wait_rule,
    )


@contextlib.contextmanager
def thread_gang(spec: GangSpec, new_mode: NewMode | None = None) -> Iterator[list[Worker]]:
    """The workers of a running gang; `new_mode` makes another way to carry rows than its shape has."""
    store = StoreServer(HOST, CREDENTIALS)
    coordinator = new_coordinator(spec, store)
    with contextlib.ExitStack() as stack:
        stack.callback(store.close)
        shards = [Shard(spec, index, coordinator, new_mode) for index in range(len(spec.shape.shard_ranks))]
        workers = []
        for _ in range(spec.shape.attention_workers):
            workers.append(Worker(spec, coordinator, new_mode))
            stack.callback(workers[-1].close)
        for shard in shards:
            stack.callback(shard.close)
        yield workers
