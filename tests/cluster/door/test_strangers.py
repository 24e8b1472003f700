"""Those who shouldn't get in, over real sockets: they are refused, and no open connection notices."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from divisi.cluster.door import Channel, Door, DoorError, Secret, TlsFiles, connect, open_door
from divisi.cluster.door.channel import STRANGER_BYTES
from divisi.cluster.door.door import MAX_STRANGERS
from divisi.cluster.door.refusals import Refusals
from divisi.cluster.seats import Address

SECRET = Secret.draw()
pytestmark = pytest.mark.usefixtures("nothing_left")


async def echo(channel: Channel) -> None:
    while True:
        channel.send(await channel.receive())


@asynccontextmanager
async def door_with_a_guest() -> AsyncIterator[tuple[Door, Address]]:
    """A door, and an open connection that must not notice what happens meanwhile."""
    door = await open_door(Address("127.0.0.1"), SECRET, echo)
    assert isinstance(door.place, Address)
    guest = await connect(door.place, SECRET, 5)
    try:
        yield door, door.place
        guest.send([b"still here"])
        async with asyncio.timeout(5):
            assert await guest.receive() == [b"still here"]
    finally:
        guest.close()
        await door.close()


async def refused(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
    """What a stranger was told before the connection ended."""
    told = b""
    try:
        async with asyncio.timeout(5):
            while data := await reader.read(4096):
                told += data
    except ConnectionError:
        pass
    finally:
        writer.close()
    return told


async def test_a_megabyte_of_noise(caplog: pytest.LogCaptureFixture) -> None:
    async with door_with_a_guest() as (_, place):
        reader, writer = await asyncio.open_connection(place.host, place.port)
        writer.write(random.Random(0).randbytes(1_000_000))
        assert await refused(reader, writer) == b""
    assert "no process of Divisi" in caplog.text


async def test_of_a_stranger_little_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    buffer_updated = Channel.buffer_updated
    monkeypatch.setattr(
        Channel, "buffer_updated", lambda channel, nbytes: (read.append(nbytes), buffer_updated(channel, nbytes))[1]
    )
    async with door_with_a_guest() as (_, place):
        read.clear()
        reader, writer = await asyncio.open_connection(place.host, place.port)
        writer.write(b"divisi-1" + bytes(1_000_000))
        assert len(await refused(reader, writer)) <= 40
        assert sum(read) <= STRANGER_BYTES == 1024


async def test_200_silent_connections_keep_nobody_out() -> None:
    async with door_with_a_guest() as (door, place):
        silent = [await asyncio.open_connection(place.host, place.port) for _ in range(200)]
        assert len(door._strangers) <= MAX_STRANGERS == 64
        for _ in range(10):
            channel = await connect(place, SECRET, 1)
            channel.send([b"honest"])
            assert await channel.receive() == [b"honest"]
            channel.close()
        assert len(door._strangers) <= MAX_STRANGERS
        for reader, writer in silent[: 200 - MAX_STRANGERS]:
            assert await refused(reader, writer) == b""
        for _, writer in silent:
            writer.close()


@pytest.mark.parametrize("start", [b"", b"divisi-1", b"divisi-1" + bytes(32)], ids=["silent", "half", "waits"])
async def test_who_does_not_come_to_the_point_is_sent_away(
    start: bytes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("divisi.cluster.door.door.HANDSHAKE_S", 0.1)
    async with door_with_a_guest() as (_, place):
        reader, writer = await asyncio.open_connection(place.host, place.port)
        writer.write(start)
        await refused(reader, writer)
    assert "did not prove within 0.1 s" in caplog.text


async def test_who_says_nothing_to_tls_is_sent_away(
    certificates: Callable[[str], TlsFiles], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Handshakes of TLS count as those of ours: 64 at most, in the same time."""
    monkeypatch.setattr("divisi.cluster.door.door.HANDSHAKE_S", 0.5)
    files = certificates("ours")
    door = await open_door(Address("127.0.0.1"), SECRET, echo, files)
    assert isinstance(door.place, Address)
    silent = [await asyncio.open_connection(door.place.host, door.place.port) for _ in range(MAX_STRANGERS + 10)]
    guest = await connect(door.place, SECRET, 5, files)
    for reader, writer in silent:
        assert await refused(reader, writer) == b""
    guest.send([b"still here"])
    assert await guest.receive() == [b"still here"]
    assert "did not prove within 0.5 s" in caplog.text
    guest.close()
    await door.close()


async def test_a_byte_now_and_then_wins_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("divisi.cluster.door.door.HANDSHAKE_S", 0.2)
    async with door_with_a_guest() as (_, place):
        reader, writer = await asyncio.open_connection(place.host, place.port)

        async def drip() -> None:
            for byte in b"divisi-1" + bytes(1000):
                writer.write(bytes([byte]))
                await asyncio.sleep(0.02)

        dripping = asyncio.create_task(drip())
        begun = asyncio.get_running_loop().time()
        await refused(reader, writer)
        assert asyncio.get_running_loop().time() - begun < 2
        dripping.cancel()
        await asyncio.gather(dripping, return_exceptions=True)


async def test_a_recorded_connection_opens_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """Everything that an honest client sent, sent again."""
    recorded = bytearray()

    async def listen_in(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inside, outside = await asyncio.open_connection(place.host, place.port)

        async def back() -> None:
            while data := await inside.read(4096):
                writer.write(data)

        answering = asyncio.create_task(back())
        while data := await reader.read(4096):
            recorded.extend(data)
            outside.write(data)
        outside.close()
        await answering
        writer.close()

    async with door_with_a_guest() as (_, place):
        tap = await asyncio.start_server(listen_in, "127.0.0.1", 0)
        channel = await connect(Address(*tap.sockets[0].getsockname()), SECRET, 5)
        channel.send([b"cancel everything"])
        assert await channel.receive() == [b"cancel everything"]
        channel.close()
        await channel.wait_closed()
        tap.close()
        reader, writer = await asyncio.open_connection(place.host, place.port)
        writer.write(recorded)
        told = await refused(reader, writer)
    assert len(recorded) > 72
    assert len(told) <= 40
    assert "does not know this gang's secret" in caplog.text


@pytest.mark.parametrize("seed", range(3))
async def test_a_connection_that_was_tampered_with_ends(seed: int) -> None:
    """A relay that lets the handshake pass and then changes one bit of the frames."""
    draw = random.Random(seed)

    async def meddle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inside, outside = await asyncio.open_connection(place.host, place.port)
        for size in (40, 32):
            outside.write(await reader.readexactly(size))
            writer.write(await inside.readexactly(size))
        frame = bytearray(await reader.readexactly(24 + 100))
        frame[draw.randrange(4, len(frame))] ^= 1 << draw.randrange(8)
        outside.write(frame)
        assert await refused(inside, outside) == b""
        writer.close()

    async with door_with_a_guest() as (_, place):
        tap = await asyncio.start_server(meddle, "127.0.0.1", 0)
        channel = await connect(Address(*tap.sockets[0].getsockname()), SECRET, 5)
        channel.send([draw.randbytes(100)])
        with pytest.raises(DoorError):
            await channel.receive()
        tap.close()
        await tap.wait_closed()


async def test_a_connection_that_is_half_closed_is_closed() -> None:
    async with door_with_a_guest() as (door, place):
        before = len(door._inside)
        reader, writer = await asyncio.open_connection(place.host, place.port)
        writer.write(b"divisi-1" + bytes(32))
        await reader.readexactly(40)
        writer.write_eof()
        assert await refused(reader, writer) == b""
        async with asyncio.timeout(1):
            while len(door._inside) > before:
                await asyncio.sleep(0)


def test_the_log_has_one_line_of_each_kind_in_a_while(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    refusals = Refusals("here", lambda: now)
    for _ in range(1000):
        refusals.note("slow", "somebody")
        refusals.note("secret", "somebody else")
    assert len(caplog.records) == 2
    now = 11.0
    refusals.note("slow", "somebody")
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 3
    assert "999 more" in caplog.records[-1].getMessage()
