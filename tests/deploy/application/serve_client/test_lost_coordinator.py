"""A coordinator that dies, does not answer, or is about to form an epoch."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
from ray.exceptions import RayError

from divisi.cluster.errors import GangNotReady
from divisi.cluster.gang.membership.status import CoordinatorStatus
from divisi.deploy.application import serve_client
from tests.deploy.application.serve_client.support import (
    Coordinator,
    Make,
    at_once,
    read,
)
from tests.support.scripted_worker import ScriptedWorker, until


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
