"""The ingress's end of the gang: the limit on unfinished requests, refusals, and streams that are given up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import ray.serve.context

from divisi.cluster.errors import GangNotReady, RequestRejected
from divisi.cluster.gang.coordinator import CoordinatorStatus
from divisi.cluster.request import Request, Sampling, TokenEvent
from divisi.deploy import serve_client
from divisi.deploy.api.app import build_app
from divisi.deploy.api.settings import ApiSettings
from divisi.deploy.limits import Gate, GateLimits, ServerStopping
from divisi.deploy.serve_client import ServeEngineClient
from divisi.model.random_checkpoint import SMALL_CONFIG, write_random_checkpoint
from divisi.model.text import TextCodec


class Response:
    """One streaming call to a worker: what it yields, and whether it was cancelled."""

    def __init__(self, request: Request, items: list[object] | None, go_on: asyncio.Event) -> None:
        self._request, self._items, self._go_on = request, items, go_on
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True

    async def __aiter__(self) -> AsyncIterator[object]:
        if self._items is not None:
            for item in self._items:
                yield item
            return
        yield [TokenEvent(self._request.request_id, (5,), None)]
        await self._go_on.wait()
        yield [TokenEvent(self._request.request_id, (), None, finish_reason="length")]


class Workers:
    """Stands for the handle of the AttentionWorker deployment."""

    def __init__(self, items: list[object] | None = None) -> None:
        self.items = items
        self.go_on = asyncio.Event()
        self.calls: list[Response] = []

    def options(self, **_: object) -> Workers:
        return self

    def remote(self, request: Request) -> Response:
        self.calls.append(Response(request, self.items, self.go_on))
        return self.calls[-1]


class Coordinator:
    """Stands for the handle of the coordinator's actor."""

    def __init__(self, **changes: Any) -> None:
        self.asked = 0
        self.answer = CoordinatorStatus(**{"ready": True, "reason": "epoch 1 serves", "epoch": 1} | changes)
        self.status = SimpleNamespace(remote=self._status)
        self.report_open = SimpleNamespace(remote=self._report_open)
        self.reports: list[tuple[str, int]] = []
        self.left_s: float | None = None

    async def _report_open(self, ingress_id: str, answers: int) -> float | None:
        self.reports.append((ingress_id, answers))
        return self.left_s

    async def _status(self) -> CoordinatorStatus:
        self.asked += 1
        await asyncio.sleep(0)
        return self.answer


@pytest.fixture
def coordinator(monkeypatch: pytest.MonkeyPatch) -> Coordinator:
    found = Coordinator()
    monkeypatch.setattr(serve_client, "find_coordinator", lambda name: found)
    return found


def make(workers: Workers, gate: Gate | None = None) -> ServeEngineClient:
    return ServeEngineClient(workers, "coordinator/m", gate or Gate(GateLimits()), "me")  # type: ignore[arg-type]


def request(number: int = 0) -> Request:
    return Request(f"r{number}", (1, 2), 4, Sampling())


async def read(client: ServeEngineClient, number: int) -> int:
    return len([event async for event in client.generate(request(number))])


async def test_one_question_for_a_whole_burst(coordinator: Coordinator) -> None:
    workers = Workers()
    client = make(workers)
    tasks = [asyncio.create_task(read(client, i)) for i in range(10)]
    while len(workers.calls) < 10:
        await asyncio.sleep(0.001)
    workers.go_on.set()
    assert await asyncio.gather(*tasks) == [2] * 10
    assert coordinator.asked == 1


async def test_a_gang_that_has_just_become_ready_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Coordinator(ready=False, reason="loading")
    monkeypatch.setattr(serve_client, "find_coordinator", lambda name: found)
    client = make(Workers([[TokenEvent("r0", (), None, finish_reason="stop")]]))
    burst = await asyncio.gather(*(read(client, i) for i in range(20)), return_exceptions=True)
    assert all(isinstance(error, GangNotReady) for error in burst)
    assert found.asked <= 2, "one question, and one for those who came while it was being asked"
    found.answer = Coordinator().answer
    assert await read(client, 0) == 1


async def test_open_answers_are_reported_until_there_are_none(coordinator: Coordinator) -> None:
    gate = Gate(GateLimits())
    workers = Workers([[TokenEvent("r0", (), None, finish_reason="length")]])
    client = make(workers, gate)
    with gate.admit(None, [request()]):
        assert await read(client, 0) == 1
        while coordinator.reports[-1:] != [("me", 1)]:
            await asyncio.sleep(0.001)
    while coordinator.reports[-1:] != [("me", 0)]:
        await asyncio.sleep(0.001)


async def test_answers_are_ended_when_the_gang_is_about_to_end(coordinator: Coordinator) -> None:
    gate = Gate(GateLimits())
    coordinator.left_s = 0.0
    client = make(Workers([[TokenEvent("r0", (), None, finish_reason="length")]]), gate)
    with gate.admit(None, [request()]) as ticket:
        await read(client, 0)
        assert isinstance(await ticket.over, ServerStopping)


async def test_a_stream_that_is_closed_is_cancelled_at_once(coordinator: Coordinator) -> None:
    workers = Workers()
    client = make(workers)
    async with aclosing(client.generate(request())) as events:
        assert (await anext(events)).token_ids == (5,)
    assert workers.calls[0].cancelled
    workers.go_on.set()
    assert await read(client, 1) == 2
    assert not workers.calls[1].cancelled


async def test_what_a_worker_without_a_seat_refuses_goes_to_another(
    coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve_client, "_RESEND_EVERY_S", 0.0)
    answers = [[GangNotReady("no seat")], [GangNotReady("no seat")], [[TokenEvent("r0", (5,), None, None, "length")]]]

    class Several(Workers):
        def remote(self, request: Request) -> Response:
            self.items = answers[len(self.calls)]  # type: ignore[assignment]
            return super().remote(request)

    workers = Several()
    async with asyncio.timeout(10):
        assert await read(make(workers), 0) == 1
    assert len(workers.calls) == 3


async def test_a_refused_request_is_not_sent_again_to_a_gang_that_serves_no_more(coordinator: Coordinator) -> None:
    workers = Workers([GangNotReady("this attention worker has stopped")])
    client = make(workers)
    reading = asyncio.create_task(read(client, 0))
    while not workers.calls:
        await asyncio.sleep(0.001)
    coordinator.answer = CoordinatorStatus(ready=False, reason="0 of 1 seats filled", epoch=1)
    with pytest.raises(GangNotReady, match="0 of 1 seats filled"):
        await reading


@pytest.mark.parametrize("error", [RequestRejected("too long"), GangNotReady("this attention worker has stopped")])
async def test_a_workers_refusal_is_raised_as_it_is(
    coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(serve_client, "_RESEND_S", 0.0)
    with pytest.raises(type(error), match=str(error)):
        await read(make(Workers([error])), 0)


async def test_a_gang_that_is_not_ready_says_what_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Coordinator(ready=False, reason="0 of 2 seats filled", failures={"expert:0": "CheckpointError: short"})
    monkeypatch.setattr(serve_client, "find_coordinator", lambda name: broken)
    with pytest.raises(GangNotReady, match=r"0 of 2 seats filled; expert:0 could not load: CheckpointError: short"):
        await read(make(Workers()), 0)


async def test_over_the_limit_http_answers_429_with_retry_after(coordinator: Coordinator, tmp_path: Path) -> None:
    config = write_random_checkpoint(tmp_path, SMALL_CONFIG | {"num_hidden_layers": 4}, seed=1)
    api = ApiSettings(served_model_name="m", max_model_len=64, vocab_size=config.vocab_size)
    workers = Workers()
    gate = Gate(GateLimits(max_requests=1, retry_after_s=7.0))
    app = build_app(make(workers, gate), TextCodec.load(tmp_path), api, gate)
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        body = {"model": "m", "prompt": "hello", "max_tokens": 4}
        first = asyncio.create_task(http.post("/v1/completions", json=body))
        while not workers.calls:
            await asyncio.sleep(0.001)
        second = await http.post("/v1/completions", json=body)
        assert second.status_code == 429
        assert int(second.headers["retry-after"]) >= 1
        assert second.json()["error"]["code"] == "overloaded"
        workers.go_on.set()
        assert (await first).status_code == 200


async def test_calls_of_one_http_request_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve would hand the HTTP request's internal id on to each call, and its router finds a call by that id."""
    ids: list[str] = []

    class Handle(Workers):
        def remote(self, request: Request) -> Response:
            ids.append(ray.serve.context._get_serve_request_context()._internal_request_id)
            return super().remote(request)

    async def ready(self: ServeEngineClient) -> None:
        return

    monkeypatch.setattr(ServeEngineClient, "check_ready", ready)
    ray.serve.context._serve_request_context.set(ray.serve.context._RequestContext(_internal_request_id="of the whole"))
    workers: Any = Handle([[TokenEvent("x", (), None, finish_reason="length")]])
    client = ServeEngineClient(workers, "none", Gate(GateLimits()))
    for _ in range(2):
        async with aclosing(client.generate(Request("x", (1,), 1, Sampling()))) as events:
            assert [event.finish_reason async for event in events] == ["length"]
    assert ids == ["", ""]
