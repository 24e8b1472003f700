"""An ingress and a worker over real sockets: order, cancellation, refusals, slow readers, what comes and goes."""

from __future__ import annotations

import asyncio
import os
import random
import threading
from pathlib import Path

import pytest

from divisi.cluster.door import connect
from divisi.cluster.errors import GangNotReady, RequestRejected
from divisi.cluster.request import TokenEvent, TokenLogprob
from divisi.cluster.seats import Address, StreamAddress
from divisi.cluster.streams import server as server_module
from divisi.cluster.streams.client import MAX_UNREAD, WorkerConnection
from divisi.cluster.streams.wire import Cancel, Refused, Report, Submit, decode, encode
from divisi.cluster.streams.workers import WorkerConnections
from tests.support.scripted_worker import (
    HOST,
    SECRET,
    ScriptedWorker,
    connected,
    only,
    read,
    request,
    token,
    tokens,
    until,
)


async def test_every_token_arrives_once_and_in_order(worker: ScriptedWorker, connection: WorkerConnection) -> None:
    """32 streams in steps of random rows, handed over by a thread as the step loop does."""
    rng, names = random.Random(1), [str(number) for number in range(32)]
    lengths = {name: rng.randint(1, 60) for name in names}
    streams = [connection.open(request(name)) for name in names]
    await until(lambda: len(worker.requests) == len(names))
    left = dict(lengths)

    def steps() -> None:
        while left:
            rows = rng.sample(sorted(left), rng.randint(1, len(left)))
            events = []
            for name in rows:
                left[name] -= 1
                at = lengths[name] - left[name]
                events.append(token(name, at, "length" if not left[name] else None))
                if not left[name]:
                    del left[name]
            worker.server.deliver(events)

    thread = threading.Thread(target=steps)
    thread.start()
    answers = [tokens(await read(stream)) for stream in streams]
    thread.join()
    assert answers == [list(range(1, lengths[name] + 1)) for name in names]
    assert worker.cancelled == []


async def test_a_step_is_one_message_to_each_ingress(worker: ScriptedWorker, address: StreamAddress) -> None:
    async with connected(address) as first, connected(address) as second:
        mine = [only(first).open(request(f"a{number}")) for number in range(5)]
        theirs = only(second).open(request("b"))
        await until(lambda: len(worker.requests) == 6)
        sent: list[int] = []
        for ingress in worker.server._ingresses:
            send = ingress.channel.send
            ingress.channel.send = lambda payloads, send=send: (sent.append(len(payloads)), send(payloads))[1]  # type: ignore[method-assign]
        worker.server.deliver([token(name, 7, "stop") for name in ("a0", "b", "a1", "a2", "a3", "a4")])
        for stream in (*mine, theirs):
            assert tokens(await read(stream)) == [7]
        assert len([count for count in sent if count]) <= 4, "two for the step; a report may go to each"


async def test_a_stream_that_is_closed_is_cancelled(worker: ScriptedWorker, connection: WorkerConnection) -> None:
    kept, given_up = connection.open(request("kept")), connection.open(request("given up"))
    await until(lambda: len(worker.requests) == 2)
    connection.close(given_up)
    await until(lambda: worker.cancelled == ["given up"])
    worker.server.deliver([token("given up", 1), token("kept", 2, "stop")])
    assert tokens(await read(kept)) == [2]
    connection.close(kept)
    connection.close(given_up)
    await asyncio.sleep(0.05)
    assert worker.cancelled == ["given up"], "an answer that has ended is not cancelled"


async def test_a_connection_cancels_nothing_of_another(worker: ScriptedWorker, address: StreamAddress) -> None:
    async with connected(address) as first:
        stream = only(first).open(request("mine"))
        await until(lambda: len(worker.requests) == 1)
        other = await connect(Path(address.path), SECRET, 2.0)
        other.send([encode(Cancel(stream.number)), encode(Submit(1, request("mine")))])
        found: list[object] = []
        while not any(isinstance(message, Refused) for message in found):
            found += [decode(payload) for payload in await other.receive()]
        other.close()
        worker.server.deliver([token("mine", 1, "stop")])
        assert tokens(await read(stream)) == [1]
        assert worker.cancelled == []
        assert len(worker.requests) == 1


async def test_refusals_are_raised_as_they_are(worker: ScriptedWorker, connection: WorkerConnection) -> None:
    worker.errors = [RequestRejected("too long"), GangNotReady("this attention worker has stopped")]
    with pytest.raises(RequestRejected, match="too long"):
        await connection.open(request("a")).take()
    with pytest.raises(GangNotReady, match="has stopped"):
        await connection.open(request("b")).take()
    worker.refuses = "this attention worker has no seat in the gang"
    with pytest.raises(GangNotReady, match="no seat"):
        await connection.open(request("c")).take()
    assert [taken.request_id for taken in worker.requests] == ["a", "b"]


async def test_an_id_is_served_once_at_a_time(worker: ScriptedWorker, connection: WorkerConnection) -> None:
    first = connection.open(request("a"))
    with pytest.raises(RequestRejected, match="'a' is already being served"):
        await connection.open(request("a")).take()
    worker.server.deliver([token("a", 1), token("b", 9)])
    worker.server.deliver([token("a", 2, "length")])
    assert tokens(await read(first)) == [1, 2]
    again = connection.open(request("a"))
    await until(lambda: len(worker.requests) == 2)
    worker.server.deliver([token("a", 3, "length")])
    assert tokens(await read(again)) == [3]


async def test_reports_say_who_takes_requests(worker: ScriptedWorker, connections: WorkerConnections) -> None:
    worker.load = Report(50, 2, 800)
    only(connections).open(request("a"))
    await until(lambda: list(connections.able().values()) == [worker.load])
    worker.refuses = "this attention worker has no seat in the gang"
    await until(lambda: not connections.able())
    worker.refuses = ""
    assert await connections.wait_until_able(5.0)


async def test_an_idle_worker_is_not_asked(
    worker: ScriptedWorker, connections: WorkerConnections, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each question wakes its step loop."""
    monkeypatch.setattr(server_module, "_REPORT_EVERY_S", 0.01)
    await until(lambda: worker.reports > 0)
    await asyncio.sleep(0.3)
    asked = worker.reports
    await asyncio.sleep(0.2)
    assert worker.reports == asked


async def test_who_stops_reading_loses_nothing_and_holds_up_nobody(
    worker: ScriptedWorker, connection: WorkerConnection
) -> None:
    slow, fast = connection.open(request("slow")), connection.open(request("fast"))
    await until(lambda: len(worker.requests) == 2)
    for step in range(5000):
        worker.server.deliver([token("slow", step), token("fast", step)])
    worker.server.deliver([token("fast", 5000, "stop"), token("slow", 5000, "stop")])
    assert tokens(await read(fast)) == list(range(5001))
    assert tokens(await read(slow)) == list(range(5001))
    assert worker.cancelled == []


async def test_who_never_reads_is_given_up_and_told_why(worker: ScriptedWorker, connection: WorkerConnection) -> None:
    slow, fast = connection.open(request("slow")), connection.open(request("fast"))
    await until(lambda: len(worker.requests) == 2)
    step = tuple(range(1024))
    for _ in range(MAX_UNREAD // len(step) + 3):
        worker.server.deliver([TokenEvent("slow", step, None), token("fast", 1)])
    await until(lambda: worker.cancelled == ["slow"])
    events = await read(slow)
    assert events[-1].finish_reason == "error"
    assert "read too slowly" in (events[-1].error or "")
    assert MAX_UNREAD < len(tokens(events)) <= MAX_UNREAD + len(step)
    worker.server.deliver([token("fast", 2, "stop")])
    assert tokens(await read(fast))[-1] == 2


async def test_an_ingress_that_reads_nothing_is_given_up(
    worker: ScriptedWorker, address: StreamAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "_STUCK_S", 0.3)
    async with connected(address) as connections:
        fast = only(connections).open(request("fast"))
        stuck = await connect(Path(address.path), SECRET, 2.0)
        stuck.send([encode(Submit(1, request("stuck")))])
        await until(lambda: len(worker.requests) == 2)
        stuck._transport.pause_reading()  # type: ignore[union-attr]
        step = tuple(range(100_000, 150_000))
        sent = 0
        async with asyncio.timeout(20):
            while worker.cancelled != ["stuck"]:
                worker.server.deliver([TokenEvent("stuck", step, None), token("fast", sent)])
                sent += 1
                await asyncio.sleep(0.01)
        worker.server.deliver([token("fast", sent, "stop")])
        assert tokens(await read(fast)) == list(range(sent + 1))
        stuck.abort()


async def test_much_to_read_is_no_reason_to_be_given_up(
    worker: ScriptedWorker, address: StreamAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "_MUCH_UNSENT", 0)
    monkeypatch.setattr(server_module, "_STUCK_S", 0.3)
    step = tuple(range(100_000, 110_000))
    slow = await connect(Path(address.path), SECRET, 2.0)
    slow.send([encode(Submit(1, request("slow")))])
    await until(lambda: len(worker.requests) == 1)
    slow._transport.pause_reading()  # type: ignore[union-attr]
    for _ in range(100):
        worker.server.deliver([TokenEvent("slow", step, None)])
        slow._transport.resume_reading()  # type: ignore[union-attr]
        await asyncio.sleep(0.001)
        slow._transport.pause_reading()  # type: ignore[union-attr]
        await asyncio.sleep(0.005)
    assert worker.cancelled == []
    slow.abort()


async def test_a_long_request_may_be_cancelled_before_it_arrives(
    worker: ScriptedWorker, connection: WorkerConnection
) -> None:
    """Short messages overtake long ones."""
    streams = [connection.open(request(f"long {number}", prompt=262_144)) for number in range(8)]
    for stream in streams[1:]:
        connection.close(stream)
    short = connection.open(request("short"))
    await until(lambda: {"long 0", "short"} <= {taken.request_id for taken in worker.requests})
    began = {taken.request_id for taken in worker.requests} - {"long 0", "short"}
    await until(lambda: set(worker.cancelled) == began)
    (long,) = [taken for taken in worker.requests if taken.request_id == "long 0"]
    assert len(long.prompt) == 262_144
    worker.server.deliver([token("short", 1, "stop"), token("long 0", 2, "stop")])
    assert tokens(await read(short)) == [1]
    assert tokens(await read(streams[0])) == [2]


async def test_what_tells_a_whole_prompt_holds_up_no_other_and_comes_first(
    worker: ScriptedWorker, connection: WorkerConnection
) -> None:
    whole, other = connection.open(request("whole", prompt_logprobs=5)), connection.open(request("other"))
    await until(lambda: len(worker.requests) == 2)
    told = (None, *(TokenLogprob(7, -0.5, tuple((top, -1.25) for top in range(5))) for _ in range(40_000)))
    worker.server.deliver([TokenEvent("whole", (1,), None, told), token("other", 1)])
    for step in range(2, 12):
        worker.server.deliver([token("whole", step), token("other", step, "stop" if step == 11 else None)])
    worker.server.deliver([token("whole", 12, "stop")])
    assert tokens(await read(other)) == list(range(1, 12))
    assert not whole._events, "the short answer was complete before the long message"
    events = await read(whole)
    assert tokens(events) == list(range(1, 13))
    assert events[0].prompt_logprobs == told


async def test_200_ingresses_come_and_go_and_leave_nothing(worker: ScriptedWorker, address: StreamAddress) -> None:
    async with connected(address) as staying:
        stream = only(staying).open(request("staying"))
        await until(lambda: len(worker.requests) == 1)
        files, tasks, threads = len(os.listdir("/proc/self/fd")), len(asyncio.all_tasks()), threading.active_count()
        for number in range(200):
            channel = await connect(Path(address.path), SECRET, 2.0)
            channel.send([encode(Submit(1, request(str(number))))])
            if number % 2:
                await channel.receive()
                channel.close()
            else:
                channel.abort()
        await until(lambda: len(worker.server._ingresses) == 1)
        # At most: what other tests have left may go meanwhile.
        await until(lambda: len(os.listdir("/proc/self/fd")) <= files and len(asyncio.all_tasks()) <= tasks)
        assert threading.active_count() <= threads
        assert set(worker.server._answers) == {"staying"}
        assert sorted(worker.cancelled) == sorted(taken.request_id for taken in worker.requests[1:])
        worker.server.deliver([token("staying", 1, "stop")])
        assert tokens(await read(stream)) == [1]
    await until(lambda: not worker.server._ingresses)


async def test_nonsense_ends_its_own_connection_only(worker: ScriptedWorker, address: StreamAddress) -> None:
    async with connected(address) as connections:
        stream = only(connections).open(request("a"))
        for nonsense in (b"\xc1", encode(Report(0, 0, 0)), encode(Submit("x", request("b")))):  # type: ignore[arg-type]
            bad = await connect(Path(address.path), SECRET, 2.0)
            bad.send([nonsense])
            await asyncio.wait_for(bad.wait_closed(), 5)
        worker.server.deliver([token("a", 1, "stop")])
        assert tokens(await read(stream)) == [1]


async def test_other_hosts_come_by_the_port(worker: ScriptedWorker) -> None:
    places = worker.server.start([Address(HOST)], SECRET)
    try:
        port = next(place.port for place in places if isinstance(place, Address))
        elsewhere = WorkerConnections("10.0.0.1", SECRET)
        elsewhere.name([StreamAddress(HOST, port, "/nowhere")])
        assert await elsewhere.wait_until_able(5.0)
        await elsewhere.close()
        here = WorkerConnections(HOST, SECRET)  # in another container: the same address, but no such path
        here.name([StreamAddress(HOST, port, "/nowhere")])
        assert await here.wait_until_able(5.0)
        await here.close()
    finally:
        worker.server.close()
