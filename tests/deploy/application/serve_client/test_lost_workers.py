"""Answers whose workers are lost go on, or end with an error that says so."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import replace

import pytest

from divisi.cluster.errors import AnswerLost, GangNotReady
from divisi.cluster.gang.membership.status import CoordinatorStatus
from divisi.cluster.request import Request, TokenEvent
from divisi.cluster.telemetry.process import Telemetry
from divisi.cluster.telemetry.spec import TelemetrySpec
from divisi.deploy.application import journal, serve_client
from tests.deploy.application.serve_client.support import (
    Coordinator,
    Make,
    collect,
    counted,
    lose,
    one_more,
    read,
    request,
    spelt,
)
from tests.support.scripted_worker import ScriptedWorker, running, until


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
