"""The ingress's end of the gang: readiness, refusals, where requests go, and streams that are given up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, aclosing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from ray.exceptions import RayError

from divisi.cluster.errors import AnswerLost, GangNotReady, Overloaded, RequestRejected
from divisi.cluster.gang.membership.coordinator import CoordinatorStatus
from divisi.cluster.request import EndReason, Request, Sampling, TokenEvent
from divisi.cluster.seats import GangShape, StreamAddress
from divisi.cluster.streams.wire import Report
from divisi.cluster.telemetry.process import Telemetry
from divisi.cluster.telemetry.spec import TelemetrySpec
from divisi.deploy import journal, serve_client
from divisi.deploy.api.app import build_app
from divisi.deploy.api.settings import ApiSettings
from divisi.deploy.limits import Gate, GateLimits, ServerStopping
from divisi.deploy.serve_client import ServeEngineClient
from divisi.model.random_checkpoint import SMALL_CONFIG, write_random_checkpoint
from divisi.model.text import TextCodec
from tests.support.scripted_worker import HOST, SECRET, ScriptedWorker, running, token, until
from tests.support.thread_gang import small_spec


class Coordinator:
    """Stands for the handle of the coordinator's actor."""

    def __init__(self, **changes: Any) -> None:
        self.asked = 0
        self.answer = CoordinatorStatus(**{"ready": True, "reason": "epoch 1 serves", "epoch": 1} | changes)
        self.status = SimpleNamespace(remote=self._status)
        self.report_open = SimpleNamespace(remote=self._report_open)
        self.reports: list[tuple[str, int]] = []
        self.left_s: float | None = None

    async def _report_open(self, ingress_id: str, answers: int, refused_tokens: int) -> float | None:
        self.reports.append((ingress_id, answers))
        self.refused_tokens = refused_tokens
        return self.left_s

    async def _status(self, traceparent: str) -> CoordinatorStatus:
        self.asked += 1
        await asyncio.sleep(0)
        return self.answer


@pytest.fixture(autouse=True)
def outside_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_client, "gang_secret", lambda spec: SECRET)
    monkeypatch.setattr(serve_client.ray.util, "get_node_ip_address", lambda: HOST)


@pytest.fixture
def worker() -> ScriptedWorker:
    return ScriptedWorker()


@pytest.fixture
def address(worker: ScriptedWorker) -> Iterator[StreamAddress]:
    with running(worker) as opened:
        yield opened


@pytest.fixture
def coordinator(monkeypatch: pytest.MonkeyPatch, address: StreamAddress) -> Coordinator:
    found = Coordinator(streams=(address,))
    monkeypatch.setattr(serve_client, "find_coordinator", lambda name: found)
    return found


@pytest.fixture
async def make() -> AsyncIterator[Callable[..., ServeEngineClient]]:
    made: list[ServeEngineClient] = []

    def make(gate: Gate | None = None, **given: Any) -> ServeEngineClient:
        spec = small_spec(Path("m"), GangShape(1, 0))
        made.append(ServeEngineClient(spec, gate or Gate(GateLimits()), "me", **given))
        return made[-1]

    yield make
    for client in made:
        await client._connections.close()


Make = Callable[..., ServeEngineClient]


def request(number: int = 0) -> Request:
    return Request(f"r{number}", (1, 2), 4, Sampling())


async def read(client: ServeEngineClient, number: int = 0) -> int:
    return sum([len(events) async for events in client.generate(request(number))])


def at_once(request: Request) -> list[TokenEvent]:
    return [token(request.request_id, 5), TokenEvent(request.request_id, (), None, finish_reason="length")]


async def test_one_question_for_a_whole_burst(coordinator: Coordinator, worker: ScriptedWorker, make: Make) -> None:
    client = make()
    tasks = [asyncio.create_task(read(client, i)) for i in range(10)]
    await until(lambda: len(worker.requests) == 10)
    worker.server.deliver([event for i in range(10) for event in at_once(request(i))])
    assert await asyncio.gather(*tasks) == [2] * 10
    assert coordinator.asked == 1


async def test_a_gang_that_has_just_become_ready_is_believed(
    coordinator: Coordinator, worker: ScriptedWorker, make: Make
) -> None:
    ready = coordinator.answer
    coordinator.answer = CoordinatorStatus(ready=False, reason="loading", epoch=0)
    worker.script = at_once
    client = make()
    burst = await asyncio.gather(*(read(client, i) for i in range(20)), return_exceptions=True)
    assert all(isinstance(error, GangNotReady) for error in burst)
    assert coordinator.asked <= 2, "one question, and one for those who came while it was being asked"
    coordinator.answer = ready
    assert await read(client) == 2


async def test_open_answers_are_reported_until_there_are_none(
    coordinator: Coordinator, worker: ScriptedWorker, make: Make
) -> None:
    gate = Gate(GateLimits())
    worker.script = at_once
    client = make(gate)
    with gate.admit(None, [request()]):
        assert await read(client) == 2
        await until(lambda: coordinator.reports[-1:] == [("me", 1)])
    await until(lambda: coordinator.reports[-1:] == [("me", 0)])


async def test_answers_are_ended_when_the_gang_is_about_to_end(
    coordinator: Coordinator, worker: ScriptedWorker, make: Make
) -> None:
    gate = Gate(GateLimits())
    coordinator.left_s = 0.0
    worker.script = at_once
    client = make(gate)
    with gate.admit(None, [request()]) as ticket:
        await read(client)
        assert isinstance(await ticket.over, ServerStopping)


async def test_a_stream_that_is_closed_is_cancelled_at_once(
    coordinator: Coordinator, worker: ScriptedWorker, make: Make
) -> None:
    worker.script = lambda request: [token(request.request_id, 5)]
    client = make()
    async with aclosing(client.generate(request())) as batches:
        assert (await anext(batches))[0].token_ids == (5,)
    await until(lambda: worker.cancelled == ["r0"])
    worker.script = at_once
    assert await read(client, 1) == 2
    await asyncio.sleep(0.05)
    assert worker.cancelled == ["r0"]


async def test_what_a_worker_refuses_goes_to_another(
    coordinator: Coordinator, worker: ScriptedWorker, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve_client, "_RESEND_EVERY_S", 0.0)
    worker.errors = [GangNotReady("this attention worker has stopped")] * 2
    worker.script = at_once
    async with asyncio.timeout(10):
        assert await read(make()) == 2
    assert len(worker.requests) == 3


async def test_requests_go_to_the_shorter_queue_and_never_to_a_worker_without_a_seat(
    coordinator: Coordinator, worker: ScriptedWorker, make: Make
) -> None:
    others = {name: ScriptedWorker() for name in ("busy", "seatless", "failed")}
    worker.load, others["busy"].load = Report(5, 0, 1000), Report(5000, 3, 1000)
    for name in ("seatless", "failed"):
        others[name].refuses = f"this attention worker is {name}"
    with ExitStack() as stack:
        addresses = [stack.enter_context(running(other)) for other in others.values()]
        coordinator.answer = CoordinatorStatus(
            True, "epoch 1 serves", 1, streams=(*coordinator.answer.streams, *addresses)
        )
        client = make()
        for made in (worker, *others.values()):
            made.script = at_once
        assert (await client.status()).ready
        await until(lambda: len(client._connections.able()) == 2)
        await until(lambda: worker.load in client._connections.able().values())
        await until(lambda: others["busy"].load in client._connections.able().values())
        assert await asyncio.gather(*(read(client, number) for number in range(30))) == [2] * 30
        assert len(worker.requests) == 30
        await client._connections.close()


def lose(worker: ScriptedWorker) -> None:
    """As its death does: all its connections end."""
    for ingress in list(worker.server._ingresses):
        worker.server._loop.call_soon_threadsafe(ingress.channel.abort)


def one_more(request: Request, end: EndReason | None = None) -> list[TokenEvent]:
    """A worker that counts: the token after the answer's first n is n."""
    done = len(request.answered)
    return [TokenEvent(request.request_id, (done,), None, finish_reason=end, index=done)]


async def collect(batches: AsyncIterator[Sequence[TokenEvent]]) -> list[TokenEvent]:
    return [event async for events in batches for event in events]


def spelt(events: Sequence[TokenEvent]) -> list[int]:
    return [token_id for event in events for token_id in event.token_ids]


def counted(telemetry: Telemetry, name: str) -> float | None:
    return telemetry.metrics.registry.get_sample_value(f"divisi_{name}_total")


async def test_the_gate_follows_the_workers_of_the_epoch_even_while_it_is_full(
    coordinator: Coordinator, worker: ScriptedWorker, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who is refused asks nobody, so that the client looks by itself."""
    monkeypatch.setattr(serve_client, "_REPORT_EVERY_S", 0.05)
    monkeypatch.setattr(serve_client, "_FRESH_S", 0.05)
    coordinator.answer = replace(coordinator.answer, workers=1)
    gate = Gate(GateLimits(max_requests=1))
    client = make(gate, limits_of=lambda workers: GateLimits(max_requests=8 * workers))
    with gate.admit(None, [request(number) for number in range(8)]):
        async with aclosing(client.generate(request())) as batches:
            going_on = asyncio.create_task(anext(batches))
            await until(lambda: len(worker.requests) == 1)
            assert gate.limits.max_requests == 8
            with pytest.raises(Overloaded):
                gate.check(None)
            coordinator.answer = replace(coordinator.answer, workers=2)
            await until(lambda: gate.limits.max_requests == 16)
            gate.check(None)
            coordinator.answer = replace(coordinator.answer, workers=0, ready=False)
            await until(lambda: not client._status.ready)
            assert gate.limits.max_requests == 16, "between two epochs there are as many as before"
            worker.server.deliver(at_once(request()))
            await going_on


async def test_an_answer_goes_on_with_another_worker_when_its_own_is_lost(
    coordinator: Coordinator, worker: ScriptedWorker, make: Make
) -> None:
    other = ScriptedWorker()
    worker.script = other.script = one_more
    with running(other) as second:
        coordinator.answer = CoordinatorStatus(True, "epoch 1 serves", 1, streams=(*coordinator.answer.streams, second))
        telemetry = Telemetry(TelemetrySpec(scraped=False), "ingress")
        client = make(telemetry=telemetry)
        assert (await client.status()).ready
        await until(lambda: len(client._connections.able()) == 2)
        async with aclosing(client.generate(request())) as batches:
            told = list(await anext(batches))
            first = worker if worker.requests else other
            survivor = other if first is worker else worker
            survivor.script = lambda request: one_more(request, "length")
            coordinator.answer = CoordinatorStatus(False, "missing attention:1", 1)
            lose(first)
            told += await collect(batches)
        assert spelt(told) == [0, 1]
        (resent,) = survivor.requests
        assert (resent.request_id, resent.answered) == ("r0#1", (0,))
        assert abs(resent.arrived - first.requests[0].arrived) < 0.2, "it keeps its age"
        assert {event.request_id for event in told} == {"r0"}
        assert (counted(telemetry, "resumed_requests"), counted(telemetry, "recomputed_tokens")) == (1, 3)
        assert counted(telemetry, "resent_requests") == 0
        await client._connections.close()


async def test_an_answer_waits_for_the_only_seat_to_be_filled_again(
    coordinator: Coordinator, worker: ScriptedWorker, make: Make
) -> None:
    """It is told nothing of it, while new requests are."""
    worker.script = one_more
    client = make()
    async with aclosing(client.generate(request())) as batches:
        told = list(await anext(batches))
        worker.refuses = "this attention worker has no seat in the gang"
        coordinator.answer = replace(coordinator.answer, ready=False, reason="0 of 1 seats filled")
        lose(worker)
        going_on = asyncio.create_task(collect(batches))
        await until(lambda: not client._connections.able())
        with pytest.raises(GangNotReady, match="0 of 1 seats filled"):
            await read(client, 1)
        await asyncio.sleep(0.3)
        assert not going_on.done()
        worker.script = lambda request: one_more(request, "stop")
        worker.refuses = ""
        told += await asyncio.wait_for(going_on, 5)
    assert spelt(told) == [0, 1]


async def test_an_answer_that_kills_its_workers_ends_with_an_error_that_says_so(
    coordinator: Coordinator, worker: ScriptedWorker, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "_STAND_BACK_S", 0.0)

    def dies(request: Request) -> list[TokenEvent]:
        if len(worker.requests) == 3:
            return one_more(request)  # and dies of the next one
        lose(worker)
        return []

    worker.script = dies
    told: list[TokenEvent] = []

    async def follow() -> None:
        async with asyncio.timeout(30), aclosing(make().generate(request())) as batches:
            async for events in batches:
                told.extend(events)
                lose(worker)

    with pytest.raises(AnswerLost, match="4 attention workers in a row were lost"):
        await follow()
    assert spelt(told) == [0]
    assert len(worker.requests) == 3 + 3, "two deaths before its token, four after it"


async def test_nobody_waits_for_a_worker_for_ever(
    coordinator: Coordinator, worker: ScriptedWorker, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve_client, "_RESUME_S", 0.2)
    worker.script = one_more
    client = make()
    async with aclosing(client.generate(request())) as batches:
        await anext(batches)
        worker.refuses = "this attention worker has no seat in the gang"
        lose(worker)
        with pytest.raises(AnswerLost, match="no attention worker could go on"):
            await collect(batches)


async def test_a_worker_that_leaves_is_no_death(coordinator: Coordinator, worker: ScriptedWorker, make: Make) -> None:
    worker.script = lambda request: []
    client = make()
    async with aclosing(client.generate(request())) as batches:
        going_on = asyncio.create_task(collect(batches))
        for turn in range(1, 9):
            await until(lambda turn=turn: len(worker.requests) == turn)  # type: ignore[misc]
            worker.server._call(worker.server._hand_back, "left", "the attention worker has left")
        await until(lambda: len(worker.requests) == 9)
        worker.server.deliver(one_more(worker.requests[-1], "stop"))
        assert spelt(await asyncio.wait_for(going_on, 5)) == [0]


async def test_a_gang_whose_workers_cannot_be_reached_is_not_ready(
    coordinator: Coordinator, worker: ScriptedWorker, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve_client, "_CONNECT_S", 0.05)
    coordinator.answer = CoordinatorStatus(True, "", 1, streams=(StreamAddress(HOST, 0, "/nowhere"),))
    with pytest.raises(GangNotReady, match="no attention worker can be reached"):
        await read(make())


async def test_a_refused_request_is_not_sent_again_to_a_gang_that_serves_no_more(
    coordinator: Coordinator, worker: ScriptedWorker, make: Make
) -> None:
    worker.errors = [GangNotReady("this attention worker has stopped")] * 1000
    reading = asyncio.create_task(read(make()))
    await until(lambda: bool(worker.requests))
    coordinator.answer = CoordinatorStatus(ready=False, reason="0 of 1 seats filled", epoch=1)
    with pytest.raises(GangNotReady, match="0 of 1 seats filled"):
        await reading


@pytest.mark.parametrize("error", [RequestRejected("too long"), GangNotReady("this attention worker has stopped")])
async def test_a_workers_refusal_is_raised_as_it_is(
    coordinator: Coordinator, worker: ScriptedWorker, make: Make, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(serve_client, "_RESEND_S", 0.0)
    worker.errors = [error]
    with pytest.raises(type(error), match=str(error)):
        await read(make())


async def test_a_gang_that_is_not_ready_says_what_failed(coordinator: Coordinator, make: Make) -> None:
    coordinator.answer = CoordinatorStatus(
        ready=False, reason="0 of 2 seats filled", epoch=1, failures={"expert:0": "CheckpointError: short"}
    )
    with pytest.raises(GangNotReady, match=r"0 of 2 seats filled; expert:0 could not load: CheckpointError: short"):
        await read(make())


async def test_over_the_limit_http_answers_429_with_retry_after(
    coordinator: Coordinator, worker: ScriptedWorker, make: Make, tmp_path: Path
) -> None:
    config = write_random_checkpoint(tmp_path, SMALL_CONFIG | {"num_hidden_layers": 4}, seed=1)
    api = ApiSettings(served_model_name="m", max_model_len=64, vocab_size=config.vocab_size)
    gate = Gate(GateLimits(max_requests=1, retry_after_s=7.0))
    app = build_app(make(gate), TextCodec.load(tmp_path), api, gate)
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        body = {"model": "m", "prompt": "hello", "max_tokens": 4}
        first = asyncio.create_task(http.post("/v1/completions", json=body))
        await until(lambda: bool(worker.requests))
        second = await http.post("/v1/completions", json=body)
        assert second.status_code == 429
        assert int(second.headers["retry-after"]) >= 1
        assert second.json()["error"]["code"] == "overloaded"
        worker.server.deliver(at_once(worker.requests[0]))
        assert (await first).status_code == 200


class Gone:
    """Stands for the handle of a coordinator that has died, or does not answer."""

    def __init__(self, error: Exception | None) -> None:
        self._error = error
        self.status = SimpleNamespace(remote=self._fail)
        self.report_open = SimpleNamespace(remote=self._fail)

    async def _fail(self, *_: object) -> None:
        if self._error is not None:
            raise self._error
        await asyncio.sleep(60)


async def test_the_gang_goes_on_while_its_coordinator_is_replaced(
    coordinator: Coordinator, worker: ScriptedWorker, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its last word, as long as a worker says that it takes requests."""
    worker.script = at_once
    client = make()
    assert await read(client) == 2
    monkeypatch.setattr(serve_client, "_FRESH_S", 0.0)
    monkeypatch.setattr(serve_client, "find_coordinator", lambda name: Gone(RayError("it has died")))
    client._coordinator = None
    assert await read(client, 1) == 2
    assert (await client.status()).ready
    monkeypatch.setattr(serve_client, "find_coordinator", lambda name: coordinator)
    coordinator.answer = CoordinatorStatus(ready=False, reason="looks who is there", epoch=0, gathering=True)
    assert await read(client, 2) == 2
    coordinator.answer = CoordinatorStatus(ready=False, reason="missing expert:0", epoch=0)
    with pytest.raises(GangNotReady, match="missing expert:0"):
        await read(client, 3)
    monkeypatch.setattr(serve_client, "find_coordinator", lambda name: Gone(RayError("it has died")))
    client._coordinator = None
    with pytest.raises(GangNotReady, match="the coordinator has stopped"):
        await read(client, 4)


async def test_a_coordinator_that_does_not_answer_holds_nobody_up(
    coordinator: Coordinator, worker: ScriptedWorker, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker.script = at_once
    client = make()
    assert await read(client) == 2
    monkeypatch.setattr(serve_client, "_FRESH_S", 0.0)
    monkeypatch.setattr(serve_client, "_STATUS_TIMEOUT_S", 0.05)
    client._coordinator = Gone(None)  # type: ignore[assignment]
    async with asyncio.timeout(10):
        assert await read(client, 1) == 2


async def test_a_request_waits_for_an_epoch_that_is_about_to_form(
    coordinator: Coordinator, worker: ScriptedWorker, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = coordinator.answer
    coordinator.answer = CoordinatorStatus(ready=False, reason="waiting for expert:0", epoch=0, recovering=True)
    worker.script = at_once
    client = make()
    reading = asyncio.create_task(read(client))
    await until(lambda: coordinator.asked > 2)
    assert not reading.done()
    coordinator.answer = ready
    async with asyncio.timeout(10):
        assert await reading == 2
    monkeypatch.setattr(serve_client, "_RECOVERY_S", 0.3)
    monkeypatch.setattr(serve_client, "_FRESH_S", 0.0)
    coordinator.answer = CoordinatorStatus(ready=False, reason="waiting for expert:0", epoch=0, recovering=True)
    async with asyncio.timeout(10):
        with pytest.raises(GangNotReady, match="waiting for expert:0"):
            await read(client, 1)
