"""Shards come and go while answers run: the tokens are the same, and no more is read than what lacked."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from divisi.cluster.dispatch.transport.rendezvous import StoreServer
from divisi.cluster.gang.membership.coordinator import Coordinator
from divisi.cluster.request import Request, Sampling
from divisi.cluster.seats import GangShape
from divisi.cluster.spec import GangSpec
from tests.support.credentials import CREDENTIALS
from tests.support.thread_gang import HOST, Shard, Worker, leaves_of, new_coordinator, small_spec, thread_gang

from .test_adoption import Replaceable, wait_for

TOKENS = 300
ASKED = [Request(f"r{i}", tuple(range(3 + i, 12 + 5 * i)), TOKENS, Sampling(0.7, seed=30 + i)) for i in range(4)]

@pytest.fixture(scope="module")
def alone(small_model: Path) -> dict[str, list[int]]:
    with thread_gang(small_spec(small_model, GangShape(1, 0))) as (worker,):
        worker.submit(*ASKED)
        return {request.request_id: worker.finish(request.request_id) for request in ASKED}


class Gang:
    """A worker and shards, of which there can be more."""

    shard_type = Shard

    def __init__(self, spec: GangSpec, stack: contextlib.ExitStack) -> None:
        self.spec, self._stack = spec, stack
        self._first_epoch = 1000
        self._store = StoreServer(HOST, CREDENTIALS)  # serves for as long as it is referred to
        self._relay: Any = Replaceable(new_coordinator(spec, self._store))
        self.shards: list[Shard] = []
        for index in range(spec.shape.expert_shards):
            self.start(index)
        self.worker = Worker(spec, self._relay)
        stack.callback(self.worker.close)
        wait_for(lambda: self.coordinator.status().ready, "not ready")

    @property
    def coordinator(self) -> Coordinator:
        """Whichever there is."""
        return self._relay.current

    def follow(self, served: int, wanted: int) -> None:
        """The coordinator dies, and another one finds the gang as it is."""
        self._relay.current = None
        self._first_epoch *= 1000
        self._store = StoreServer(HOST, CREDENTIALS)
        latter = Coordinator(
            replace(self.spec.shape, expert_shards=served), self._store.address, first_epoch=self._first_epoch,
            spec=self.spec.fingerprint, gather_s=60.0, virtual_shards=leaves_of(self.spec),
        )  # fmt: skip
        if wanted != served:
            latter.scale(wanted)
        self._relay.current = latter
        wait_for(lambda: latter.status().ready, "the epoch is not adopted")

    def start(self, index: int | None) -> Shard:
        shard = self.shard_type(self.spec, index, self._relay)
        self._stack.callback(shard.close)
        self.shards.append(shard)
        return shard

    @contextlib.contextmanager
    def answering(self, alone: dict[str, list[int]], requests: Sequence[Request] = ASKED) -> Iterator[None]:
        """Meanwhile the requests are under way, over and over, and their tokens are those of a model alone."""
        ended = threading.Event()

        def ask() -> None:
            for round_ in itertools.count():
                asked = [replace(request, request_id=f"{request.request_id} {round_}") for request in requests]
                self.worker.submit(*asked)
                assert [self.worker.finish(request.request_id) for request in asked] == list(alone.values())
                if ended.is_set():
                    return

        with ThreadPoolExecutor(1) as pool:
            answers = pool.submit(ask)
            try:
                self.answers_go_on()
                yield
            finally:
                ended.set()
            answers.result()

    def answers_go_on(self) -> None:
        """Steps are taken, from now on."""
        seen = self.generated()
        wait_for(lambda: self.generated() > seen + 20, "no tokens come")

    def generated(self) -> int:
        return self.worker.loop.ask(self.worker.engine.stats).result(20).generated_tokens

    def scaled(self, shards: int) -> None:
        """They serve, and every one of them reaches all others."""
        wait_for(lambda: not self.coordinator.scale_status().waits_for, f"{self.coordinator.scale_status()}")
        status = self.coordinator.scale_status()
        assert (status.expert_shards, status.wanted) == (shards, shards)

    def read(self) -> list[float]:
        """Bytes that each shard has read so far."""
        return [shard.rank._weights["weight_bytes_read"] for shard in self.shards]

    def served(self) -> list[float]:
        """Virtual shards that each seat serves in the epoch of now."""
        membership = self.coordinator._roster.membership
        layout = None if membership is None else membership.layout
        return [] if layout is None else [len(own) for own in layout.served]

    def held(self) -> list[float]:
        """Virtual shards that each could serve."""
        return [len(shard.rank._bank.held) if shard.rank._bank is not None else 0 for shard in self.shards]

    def stored(self) -> list[float]:
        """Bytes of weights that each had in memory when it was last done with loading and giving up."""
        return [shard.rank._weights["weight_bytes"] if shard.rank.experts else 0.0 for shard in self.shards]


@contextlib.contextmanager
def gang_of(spec: GangSpec) -> Iterator[Gang]:
    with contextlib.ExitStack() as stack:
        yield Gang(spec, stack)


def test_two_shards_become_three_and_two_again(small_model: Path, alone: dict[str, list[int]]) -> None:
    spec = small_spec(small_model, GangShape(1, 2))
    leaves = leaves_of(spec)
    with gang_of(spec) as gang:
        first, stored = gang.read(), gang.stored()
        per_leaf = first[0] / (leaves / 2)
        assert first == [per_leaf * leaves / 2] * 2
        with gang.answering(alone):
            assert gang.coordinator.scale(3).waits_for == ("expert:2 is not there yet",)
            gang.start(2)
            gang.scaled(3)
            third = leaves // 3
            assert gang.read() == [*first, per_leaf * third], "the new one reads its share, and nobody else anything"
            assert gang.coordinator.scale_status().bytes_read == per_leaf * third
            wait_for(lambda: sum(gang.stored()) == sum(stored), "it is not given up")
            gang.answers_go_on()
            gang.coordinator.scale(2)
            gang.scaled(2)
            assert sum(gang.read()) == sum(first) + 2 * per_leaf * third, "what the third had is read by the others"
            gang.answers_go_on()
        assert gang.worker.engine.stats().aborted_steps == 0, "each change was between two steps"
        wait_for(lambda: gang.shards[2].rank.is_spare, "the third still takes itself to be wanted")
        wait_for(lambda: gang.stored() == [*stored, 0.0], f"{gang.stored()} are held")


@pytest.mark.verify
@pytest.mark.parametrize("victim", ["one that serves", "the new one"])
def test_a_shard_that_dies_meanwhile_is_replaced_as_ever(
    small_model: Path, alone: dict[str, list[int]], victim: str
) -> None:
    """No epoch waits for the change; and it comes all the same."""
    with gang_of(small_spec(small_model, GangShape(1, 2))) as gang:
        spare = gang.start(None)
        with gang.answering(alone):
            gang.coordinator.scale(3)
            if victim == "one that serves":
                gang.shards[0].close()
                wait_for(lambda: spare.rank.serves, "the spare does not take the place")
                assert gang.coordinator.scale_status().expert_shards == 2
                wait_for(lambda: gang.coordinator.status().ready, "it does not serve")
            else:
                new = gang.start(2)
                wait_for(lambda: new.rank._watch is not None and new.rank._watch.seat is not None, "it has no seat")
                new.close()
            gang.start(2)
            gang.scaled(3)


@pytest.mark.verify
def test_a_coordinator_that_follows_goes_on_with_the_change(small_model: Path, alone: dict[str, list[int]]) -> None:
    """It knows how many there were and are to be, and hears from the shards what they hold."""
    spec = small_spec(small_model, GangShape(1, 2))
    with gang_of(spec) as gang, gang.answering(alone):
        gang.coordinator.scale(3)
        epoch = gang.coordinator.status().epoch
        gang.follow(served=2, wanted=3)
        assert gang.coordinator.status().epoch == epoch, "nobody has noticed"
        gang.start(2)
        gang.scaled(3)
        epoch = gang.coordinator.status().epoch
        gang.follow(served=3, wanted=3)
        assert gang.coordinator.status().epoch == epoch
        gang.answers_go_on()
        gang.coordinator.scale(1)
        gang.scaled(1)


def test_copies_serve_at_once_what_a_dead_shard_served(small_model: Path, alone: dict[str, list[int]]) -> None:
    """Nobody comes in its place meanwhile; once somebody does, it serves its share again."""
    with gang_of(small_spec(small_model, GangShape(1, 2), expert_copies=1)) as gang:
        wait_for(lambda: gang.held() == [leaves_of(gang.spec)] * 2, "each is to hold a copy of what the other serves")
        with gang.answering(alone):
            gang.shards[1].close()
            wait_for(lambda: gang.served() == [leaves_of(gang.spec), 0], "the other does not serve it all")
            wait_for(lambda: gang.coordinator.status().ready, "it does not serve")
            gang.answers_go_on()
            gang.start(1)
            wait_for(lambda: gang.served() == [leaves_of(gang.spec) / 2] * 2, "it does not serve its share again")
