"""Readiness, refusals, where requests go, and streams that are given up."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack, aclosing
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from divisi.cluster.errors import GangNotReady, Overloaded, RequestRejected
from divisi.cluster.gang.membership.status import CoordinatorStatus
from divisi.cluster.seats import StreamAddress
from divisi.cluster.streams.wire import Report
from divisi.deploy.api.app import build_app
from divisi.deploy.api.settings import ApiSettings
from divisi.deploy.application import serve_client
from divisi.deploy.limits import Gate, GateLimits, ServerStopping
from divisi.model.random_checkpoint import SMALL_CONFIG, write_random_checkpoint
from divisi.model.text import TextCodec
from tests.deploy.application.serve_client.support import (
    Coordinator,
    Make,
    at_once,
    read,
    request,
)
from tests.support.scripted_worker import HOST, ScriptedWorker, running, token, until


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
