"""Workers that leave, fall silent, fail or die: what their streams hear of it, and how soon."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from divisi.cluster.errors import GangNotReady, WorkerLeft, WorkerLost
from divisi.cluster.seats import StreamAddress
from divisi.cluster.streams import client as client_module
from divisi.cluster.streams import server as server_module
from divisi.cluster.streams.client import WorkerConnection
from divisi.cluster.streams.death import is_ending
from divisi.cluster.streams.workers import WorkerConnections
from tests.support.scripted_worker import (
    HOST,
    SECRET,
    ScriptedWorker,
    connected,
    only,
    read,
    request,
    running,
    token,
    tokens,
    until,
)

ROOT = Path(__file__).parents[3]


async def test_a_worker_that_leaves_lets_its_answers_end(
    worker: ScriptedWorker, connections: WorkerConnections
) -> None:
    connection = only(connections)
    stream = connection.open(request("a"))
    await until(lambda: len(worker.requests) == 1)
    leaving = threading.Thread(target=worker.server.leave, args=(10.0,))
    leaving.start()
    await until(lambda: not connections.able())
    with pytest.raises(GangNotReady, match="is leaving"):
        await connection.open(request("b")).take()
    worker.server.deliver([token("a", 1)])
    assert (await stream.take())[0].token_ids == (1,)
    assert leaving.is_alive()
    worker.server.deliver([token("a", 2, "stop")])
    assert tokens(await read(stream)) == [2]
    await asyncio.to_thread(leaving.join, 5)
    assert not leaving.is_alive()


async def test_what_outlasts_the_grace_is_handed_back(worker: ScriptedWorker, connection: WorkerConnection) -> None:
    stream = connection.open(request("a"))
    await until(lambda: len(worker.requests) == 1)
    begin = time.monotonic()
    await asyncio.to_thread(worker.server.leave, 0.2)
    assert 0.2 <= time.monotonic() - begin < 2
    closing = asyncio.create_task(asyncio.to_thread(worker.server.close))
    with pytest.raises(WorkerLeft, match="the attention worker has left"):
        await read(stream)
    assert worker.cancelled == ["a"]
    await closing


async def test_a_worker_that_fails_hands_back_after_what_it_has_told(
    worker: ScriptedWorker, connection: WorkerConnection
) -> None:
    stream = connection.open(request("a"))
    await until(lambda: len(worker.requests) == 1)
    worker.server.deliver([token("a", 1)])
    worker.server.fail()
    assert (await stream.take())[0].token_ids == (1,)
    with pytest.raises(WorkerLost, match="the attention worker failed"):
        await read(stream)
    assert worker.cancelled == ["a"]


async def test_a_worker_that_leaves_hands_over_once_there_is_another(
    worker: ScriptedWorker, address: StreamAddress
) -> None:
    other = ScriptedWorker()
    other.refuses = "it has no seat"
    with running(other) as second:
        async with connected(address) as connections:
            stream = only(connections).open(request("a"))
            await until(lambda: len(worker.requests) == 1)
            leaving = asyncio.create_task(asyncio.to_thread(worker.server.leave, 10.0))
            await until(lambda: not connections.able())
            worker.server.deliver([token("a", 1)])
            assert (await stream.take())[0].token_ids == (1,), "as long as there is no other"
            connections.name([address, second])
            other.refuses = ""
            worker.server.deliver([token("a", 2)])
            with pytest.raises(WorkerLeft, match="leaving"):
                await read(stream)
            await asyncio.wait_for(leaving, 5)
            assert worker.cancelled == ["a"]


async def test_the_answers_of_a_silent_worker_go_elsewhere_and_stay_where_there_is_no_other(
    worker: ScriptedWorker, address: StreamAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "SILENT_S", 0.3)
    monkeypatch.setattr(server_module, "_BEAT_EVERY_S", 0.05)
    monkeypatch.setattr(worker.server, "_tell_all", lambda again=False: None)
    other = ScriptedWorker()
    with running(other) as second:
        async with connected(address) as connections:
            silent = only(connections)
            stream = silent.open(request("a"))
            await until(lambda: silent.is_silent and len(worker.requests) == 1)
            assert only(connections) is silent, "it may yet speak"
            worker.server.deliver([token("a", 1)])
            assert (await stream.take())[0].token_ids == (1,)
            connections.name([address, second])
            with pytest.raises(WorkerLost, match="has said nothing"):
                await read(stream)
            assert only(connections) is not silent
            await until(lambda: worker.cancelled == ["a"])
            kept = only(connections).open(request("b"))
            await asyncio.sleep(0.5)
            other.server.deliver([token("b", 1, "stop")])
            assert tokens(await read(kept)) == [1], "a worker that beats is not silent, however long a step takes"


async def test_an_ingress_that_was_stopped_itself_suspects_nobody(
    worker: ScriptedWorker, address: StreamAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "SILENT_S", 0.3)
    monkeypatch.setattr(client_module, "_LATE_S", 0.25)
    monkeypatch.setattr(server_module, "_BEAT_EVERY_S", 0.05)
    other = ScriptedWorker()
    with running(other) as second:
        async with connected(address, second) as connections:
            first, _ = connections.able()
            streams = {connection: connection.open(request("a")) for connection in connections.able()}
            await until(lambda: len(worker.requests) + len(other.requests) == 2)
            await asyncio.sleep(0.05)
            time.sleep(0.6)  # nothing of this process runs meanwhile but the threads of the servers
            await asyncio.sleep(0.05)
            worker.server.deliver([token("a", 1, "stop")])
            other.server.deliver([token("a", 1, "stop")])
            assert [tokens(await read(stream)) for stream in streams.values()] == [[1], [1]]
            assert not first.is_silent


async def test_the_end_of_a_connection_ends_its_answers_at_once(worker: ScriptedWorker, address: StreamAddress) -> None:
    async with connected(address) as connections, connected(address) as others:
        stream, other = only(connections).open(request("a")), only(others).open(request("b"))
        await until(lambda: len(worker.requests) == 2)
        worker.server.deliver([token("a", 1)])
        await stream.take()
        await connections.close()
        with pytest.raises(WorkerLost, match="the attention worker was lost"):
            await read(stream)
        await until(lambda: worker.cancelled == ["a"])
        worker.server.deliver([token("b", 1, "stop")])
        assert tokens(await read(other)) == [1]
        assert not worker.server._answers


async def test_a_worker_whose_process_is_being_ended_is_lost_before_its_sockets_are(
    worker: ScriptedWorker, connection: WorkerConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = connection.open(request("a"))
    await until(lambda: len(worker.requests) == 1)
    looked: list[int] = []
    monkeypatch.setattr(client_module, "is_ending", lambda pid: not looked.append(pid))
    with pytest.raises(WorkerLost, match="the attention worker was lost"):
        await read(stream)
    assert set(looked) == {os.getpid()}


async def test_nobody_looks_after_an_idle_worker(
    worker: ScriptedWorker, connection: WorkerConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[int] = []
    monkeypatch.setattr(client_module, "is_ending", lambda pid: bool(looked.append(pid)))
    stream = connection.open(request("a"))
    worker.server.deliver([token("a", 1, "stop")])
    await until(lambda: len(worker.requests) == 1)
    worker.server.deliver([token("a", 1, "stop")])
    await read(stream)
    assert looked
    await asyncio.sleep(0.05)
    before = len(looked)
    await asyncio.sleep(0.1)
    assert len(looked) == before


def test_processes_that_end() -> None:
    assert not is_ending(os.getpid())
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        assert not is_ending(process.pid)
        process.kill()
        for _ in range(500):
            if is_ending(process.pid):
                break
            time.sleep(0.01)
        assert is_ending(process.pid), "a zombie"
        process.wait()
        assert is_ending(process.pid)


PROCESS = """
import sys, threading
from pathlib import Path
from tests.support.scripted_worker import SECRET, ScriptedWorker, token
worker = ScriptedWorker()
worker.script = lambda request: [token(request.request_id, 1)]
worker.server.start([Path(sys.argv[1])], SECRET)
print("open", flush=True)
threading.Event().wait()
"""


async def test_the_streams_of_a_killed_process_learn_of_it_at_once(
    tmp_path: Path, record_result: Callable[[str, object], None], full_tier: bool
) -> None:
    with tempfile.TemporaryDirectory(prefix="d") as folder:
        path = f"{folder}/worker"
        command = [sys.executable, "-c", PROCESS, path]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, cwd=ROOT, env=os.environ | {"PYTHONPATH": "."}
        ) as process:
            try:
                assert process.stdout is not None
                await asyncio.to_thread(process.stdout.readline)
                async with connected(StreamAddress(HOST, 0, path)) as connections:
                    streams = [only(connections).open(request(str(number))) for number in range(64)]
                    for stream in streams:
                        await stream.take()
                    process.kill()
                    killed_at = time.monotonic()
                    for stream in streams:
                        with pytest.raises(WorkerLost, match="the attention worker was lost"):
                            await read(stream)
                    took = time.monotonic() - killed_at
            finally:
                process.kill()
    record_result("ms until 64 streams of a killed process knew", round(1000 * took, 1))
    assert took < (0.1 if full_tier else 0.5), "the quick tier runs beside other tests"


async def test_a_worker_that_comes_again_is_found_again(worker: ScriptedWorker, tmp_path: Path) -> None:
    with running(worker) as address:
        async with connected(address) as connections:
            await asyncio.to_thread(worker.server.close)
            await until(lambda: not connections.able())
            successor = ScriptedWorker()
            successor.server.start([Path(address.path)], SECRET)
            try:
                assert await connections.wait_until_able(5.0)
                stream = only(connections).open(request("a"))
                await until(lambda: len(successor.requests) == 1)
                successor.server.deliver([token("a", 1, "stop")])
                assert tokens(await read(stream)) == [1]
                connections.name(())
            finally:
                await asyncio.to_thread(successor.server.close)
