"""A request that kills what computes it: it ends, the others go on; and deaths by chance end nobody."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from divisi.cluster.dispatch.meter import MeteredExperts
from divisi.cluster.dispatch.transport.rendezvous import StoreServer
from divisi.cluster.engine.step.plan import Run, StepPlan
from divisi.cluster.errors import StepAborted
from divisi.cluster.request import Request, Sampling
from divisi.cluster.seats import GangShape
from divisi.cluster.spec import GangSpec
from divisi.model.dispatcher import Dispatcher
from tests.support.credentials import CREDENTIALS
from tests.support.thread_gang import HOST, Shard, Worker, new_coordinator, small_spec, thread_gang

TOKENS = 60
OLD = [Request(f"old{number}", tuple(range(5 + number, 25 + number)), TOKENS, Sampling()) for number in range(8)]
POISON = Request("poison", (9, 9, 8), TOKENS, Sampling())


class Mortal(Shard):
    """Dies in a layer when `dies` is set, as far as its peers can see, and is back at once."""

    def __init__(self, *args: Any) -> None:
        self.dies, self.deaths = threading.Event(), 0
        super().__init__(*args)

    def loaded(self, experts: MeteredExperts) -> None:
        compute = experts.measured

        def measured(*args: Any) -> Any:
            if self.dies.is_set():
                self.dies.clear()
                self.deaths += 1
                raise StepAborted("died in a layer")
            return compute(*args)

        experts.measured = measured  # type: ignore[method-assign]


@contextlib.contextmanager
def mortal_gang(spec: GangSpec, kills: Callable[[Run], bool]) -> Iterator[tuple[list[Worker], Mortal]]:
    """A gang with one shard, which dies in every step with a run of which `kills` says so."""
    store = StoreServer(HOST, CREDENTIALS)  # lives as long as it is referred to
    coordinator = new_coordinator(spec, store)
    with contextlib.ExitStack() as stack:
        shard = Mortal(spec, 0, coordinator)
        stack.callback(shard.close)
        workers = [Worker(spec, coordinator) for _ in range(spec.shape.attention_workers)]
        for worker in workers:
            stack.callback(worker.close)
            _poison(worker, shard, kills)
        yield workers, shard


def _poison(worker: Worker, shard: Mortal, kills: Callable[[Run], bool]) -> None:
    run_pass = worker.engine.run_pass

    def deadly(plan: StepPlan, index: int, dispatcher: Dispatcher) -> None:
        if any(kills(run) for run in plan.runs):
            shard.dies.set()
        run_pass(plan, index, dispatcher)

    worker.engine.run_pass = deadly  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def alone(small_model: Path) -> dict[str, list[int]]:
    with thread_gang(small_spec(small_model, GangShape(1, 0))) as (worker,):
        worker.submit(*OLD)
        return {request.request_id: worker.finish(request.request_id) for request in OLD}


def both(workers: list[Worker]) -> Iterator[tuple[Worker, list[Request]]]:
    yield from zip(workers, (OLD[:4], OLD[4:]), strict=True)


@pytest.mark.parametrize("elder", [False, True], ids=["newcomer", "elder"])
def test_the_poison_ends_and_the_eight_others_do_not(
    small_model: Path, alone: dict[str, list[int]], elder: bool, record_result: Callable[[str, object], None]
) -> None:
    """Either a request that comes ninth, or one of the eight when its answer has grown to a certain length."""

    def kills(run: Run) -> bool:
        request = run.sequence.request
        return request.request_id == "poison" or (elder and request == OLD[6] and run.sequence.num_generated > 9)

    with mortal_gang(small_spec(small_model, GangShape(2, 1)), kills) as (workers, shard):
        for worker, requests in both(workers):
            worker.submit(*requests)
        for worker, requests in both(workers):
            worker.wait_for_tokens(requests[-1].request_id, 3)
        if not elder:
            workers[1].submit(POISON)
        name = OLD[6].request_id if elder else "poison"
        got = workers[1].finish(name)
        for worker, requests in both(workers):
            for request in requests:
                if request.request_id != name:
                    assert worker.finish(request.request_id) == alone[request.request_id]
                    assert worker.events[request.request_id][-1].finish_reason == "length"
        end = workers[1].events[name][-1]
        assert end.finish_reason == "lost"
        assert "may have died of it" in (end.error or "")
        assert got == (alone[name][:10] if elder else [])
        record_result(f"deaths by a poisoned {'elder' if elder else 'newcomer'} among nine requests", shard.deaths)
        assert shard.deaths <= 6


@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.verify) for seed in range(1, 6))])
def test_ten_kills_in_a_long_prefill_end_nobody(small_model: Path, seed: int) -> None:
    """At random steps, and at most two in a row in one of them."""
    rng, struck = random.Random(seed), Counter[int]()
    prompt = tuple(rng.randrange(1, 60) for _ in range(4_000))
    long = Request("long", prompt, 5, Sampling())
    beside = Request("beside", (3, 4, 5), 100, Sampling())
    fields: dict[str, Any] = {"max_model_len": 4_096, "kv_memory": 64 * 2**20, "max_step_tokens": 256}
    steps = len(prompt) // 128
    planned = Counter(rng.choices(range(steps), k=10))
    wanted = {step * 128: min(kills, 2) for step, kills in planned.items()}
    while sum(wanted.values()) < 10:
        wanted.setdefault(rng.randrange(steps) * 128, 1)

    def kills(run: Run) -> bool:
        """The chunk that holds such a position dies, as often as it is to."""
        if run.sequence.request.request_id != "long":
            return False
        due = [at for at in wanted if run.start <= at < run.end and struck[at] < wanted[at]]
        for at in due[:1]:
            struck[at] += 1
        return bool(due)

    with thread_gang(small_spec(small_model, GangShape(1, 0), **fields)) as (worker,):
        worker.submit(long, beside)
        expected = {name: worker.finish(name) for name in ("long", "beside")}
    begin = time.monotonic()
    with mortal_gang(small_spec(small_model, GangShape(2, 1), **fields), kills) as (workers, shard):
        workers[0].submit(long)
        workers[1].submit(beside)
        found = {"long": workers[0].finish("long", 120), "beside": workers[1].finish("beside", 120)}
    assert found == expected, f"seed {seed}"
    assert shard.deaths == 10 == sum(struck.values()), f"seed {seed}: after {time.monotonic() - begin:.1f} s"
