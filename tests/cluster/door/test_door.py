"""Doors and channels over real sockets, honest peers."""

from __future__ import annotations

import asyncio
import random
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import uvloop

from divisi.cluster.door import (
    MAX_FRAME,
    Channel,
    ChannelClosed,
    DoorError,
    HandshakeFailed,
    Place,
    Secret,
    SecretError,
    TlsFiles,
    connect,
    open_door,
    private_folder,
)
from divisi.cluster.seats import Address

SECRET = Secret.draw()
pytestmark = pytest.mark.usefixtures("nothing_left")


async def echo(channel: Channel) -> None:
    while True:
        channel.send(await channel.receive())


class Visits:
    """Hands out the channels that a door accepts."""

    def __init__(self) -> None:
        self.channels: asyncio.Queue[Channel] = asyncio.Queue()

    async def __call__(self, channel: Channel) -> None:
        await self.channels.put(channel)
        await channel.wait_closed()


async def receive(channel: Channel, count: int) -> list[bytes]:
    arrived: list[bytes] = []
    async with asyncio.timeout(10):
        while len(arrived) < count:
            arrived += await channel.receive()
    return arrived


async def test_payloads_go_in_both_directions_in_order(place: Place) -> None:
    door = await open_door(place, SECRET, echo)
    channel = await connect(door.place, SECRET, 5)
    sent = [str(number).encode() * (number % 50) for number in range(500)]
    for start in range(0, 500, 7):
        channel.send(sent[start : start + 7])
    assert await receive(channel, 500) == sent
    channel.close()
    await channel.wait_closed()
    await door.close()


async def test_long_payloads_are_cut_and_short_ones_overtake_them(place: Place) -> None:
    visits = Visits()
    door = await open_door(place, SECRET, visits)
    channel = await connect(door.place, SECRET, 5)
    other = await visits.channels.get()
    draw = random.Random(0)
    long = [draw.randbytes(20 * MAX_FRAME), draw.randbytes(3 * MAX_FRAME + 1)]
    channel.send(long)
    assert channel.buffered > 0
    channel.send([b"short"])
    arrived = await receive(other, 3)
    assert set(arrived) == {b"short", *long}
    assert arrived[2] is max(arrived, key=len)  # of the other two, the kernel may have taken all at once
    assert channel.buffered == 0
    channel.close()
    await door.close()


async def test_what_was_sent_before_closing_arrives(place: Place) -> None:
    visits = Visits()
    door = await open_door(place, SECRET, visits)
    channel = await connect(door.place, SECRET, 5)
    other = await visits.channels.get()
    long = bytes(2 * MAX_FRAME)
    channel.send([long, b"last words"])
    channel.close()
    assert sorted(await receive(other, 2)) == [long, b"last words"]
    with pytest.raises(ChannelClosed, match="closed by the other side"):
        await other.receive()
    with pytest.raises(ChannelClosed, match="closed on this side"):
        channel.send([b"more"])
    await door.close()


async def test_a_sender_does_not_wait_for_a_reader_that_stands_still(place: Place) -> None:
    """What a reader leaves unread is bounded on its side, shows as `buffered` on the sender's, and still arrives."""
    visits = Visits()
    door = await open_door(place, SECRET, visits)
    channel = await connect(door.place, SECRET, 5)
    other = await visits.channels.get()
    for _ in range(400):
        channel.send([bytes(MAX_FRAME // 4)])
    async with asyncio.timeout(10):
        while other._reading:
            await asyncio.sleep(0)
    assert other._arrived_bytes < 5 * 2**20
    assert channel.buffered > 2**20
    assert len(await receive(other, 400)) == 400
    assert channel.buffered == 0
    channel.close()
    await door.close()


async def test_closing_does_not_wait_for_a_peer_that_reads_nothing(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("divisi.cluster.door.channel._FLUSH_S", 0.05)
    visits = Visits()
    door = await open_door(place, SECRET, visits)
    channel = await connect(door.place, SECRET, 5)
    other = await visits.channels.get()
    for _ in range(400):
        channel.send([bytes(MAX_FRAME // 4)])
    async with asyncio.timeout(5):
        while other._reading:
            await asyncio.sleep(0)
        channel.close()
        await channel.wait_closed()
        other.abort()
        await door.close()


async def test_an_end_is_known_at_once(place: Place) -> None:
    visits = Visits()
    door = await open_door(place, SECRET, visits)
    channel = await connect(door.place, SECRET, 5)
    other = await visits.channels.get()
    waiting = asyncio.create_task(channel.receive())
    await asyncio.sleep(0)
    other.abort()
    async with asyncio.timeout(0.5):
        with pytest.raises(ChannelClosed):
            await waiting
    await door.close()


async def test_a_handler_that_fails_ends_its_own_connection(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    async def fail(channel: Channel) -> None:
        if await channel.receive() == [b"fail"]:
            raise RuntimeError("of the handler")
        await echo(channel)

    door = await open_door(place, SECRET, fail)
    bad, good = [await connect(door.place, SECRET, 5) for _ in range(2)]
    bad.send([b"fail"])
    good.send([b"first"])
    with pytest.raises(ChannelClosed):
        await receive(bad, 1)
    good.send([b"still here"])
    assert await receive(good, 1) == [b"still here"]
    assert "its handler failed" in caplog.text
    good.close()
    await door.close()


async def test_200_connections_leave_nothing(place: Place) -> None:
    door = await open_door(place, SECRET, echo)
    for number in range(200):
        channel = await connect(door.place, SECRET, 5)
        channel.send([b"hello"])
        assert await receive(channel, 1) == [b"hello"]
        (channel.close if number % 2 else channel.abort)()
        await channel.wait_closed()
    async with asyncio.timeout(5):
        while door._inside or door._strangers:
            await asyncio.sleep(0)
    await door.close()


async def test_a_door_closes_with_everybody_inside(place: Place) -> None:
    door = await open_door(place, SECRET, echo)
    channels = [await connect(door.place, SECRET, 5) for _ in range(3)]
    await door.close()
    for channel in channels:
        with pytest.raises(ChannelClosed):
            await receive(channel, 1)
    with pytest.raises(DoorError, match="cannot reach"):
        await connect(door.place, SECRET, 5)


async def test_another_secret_is_told_apart(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    door = await open_door(place, SECRET, echo)
    with pytest.raises(HandshakeFailed, match="same secret"):
        await connect(door.place, Secret.draw(), 5)
    assert "gang.secret_file" in caplog.text
    await door.close()


async def test_connecting_has_a_deadline(folder: Path) -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_unix_server(silent, folder / "silent")
    with pytest.raises(DoorError, match=r"did not answer within 0\.05 s"):
        await connect(folder / "silent", SECRET, 0.05)
    server.close()
    await server.wait_closed()


async def test_sockets_of_this_node_are_for_their_owner_only(folder: Path) -> None:
    door = await open_door(folder / "new" / "door", SECRET, echo)
    assert stat.S_IMODE((folder / "new").stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "new" / "door").stat().st_mode) == 0o600
    await door.close()
    assert not (folder / "new" / "door").exists()


async def test_a_folder_of_others_and_a_long_path_are_refused(folder: Path) -> None:
    folder.chmod(0o755)
    with pytest.raises(DoorError, match="mode 0700"):
        await open_door(folder / "door", SECRET, echo)
    link = folder / "link"
    link.symlink_to("/")
    with pytest.raises(DoorError, match="mode 0700"):
        private_folder(link)
    folder.chmod(0o700)
    with pytest.raises(DoorError, match="at most 107 bytes"):
        await open_door(folder / ("d" * 100), SECRET, echo)


async def test_only_one_address_and_a_free_one() -> None:
    with pytest.raises(DoorError, match="give the node's own"):
        await open_door(Address("0.0.0.0"), SECRET, echo)
    door = await open_door(Address("127.0.0.1"), SECRET, echo)
    with pytest.raises(DoorError, match="Address already in use"):
        await open_door(door.place, SECRET, echo)
    await door.close()


async def test_tls_with_certificates_of_one_ca(certificates: Callable[[str], TlsFiles]) -> None:
    files = certificates("ours")
    door = await open_door(Address("127.0.0.1"), SECRET, echo, files)
    channel = await connect(door.place, SECRET, 5, files)
    long = random.Random(0).randbytes(3 * MAX_FRAME)
    channel.send([b"prompt", long])
    assert await receive(channel, 2) == [b"prompt", long]
    channel.close()
    await channel.wait_closed()
    with pytest.raises(DoorError):
        await connect(door.place, SECRET, 5)  # without TLS
    with pytest.raises(DoorError):
        await connect(door.place, SECRET, 5, certificates("theirs"))
    with pytest.raises(HandshakeFailed, match="same secret"):
        await connect(door.place, Secret.draw(), 5, files)
    await door.close()


async def test_certificate_files_that_do_not_work_are_named(
    certificates: Callable[[str], TlsFiles], tmp_path: Path
) -> None:
    files, other = certificates("ours"), certificates("theirs")
    for changed, says in (
        (TlsFiles(str(tmp_path / "none"), files.key, files.ca), "none: cannot read a certificate"),
        (TlsFiles(files.certificate, other.key, files.ca), "belong together"),
        (TlsFiles(files.certificate, files.key, files.key), "cannot use the CA certificates"),
    ):
        with pytest.raises(SecretError, match=says):
            await open_door(Address("127.0.0.1"), SECRET, echo, changed)


def test_the_same_on_the_other_event_loop(folder: Path, certificates: Callable[[str], TlsFiles]) -> None:
    """Ray Serve runs replicas on uvloop, whose transports are not asyncio's."""

    async def main() -> None:
        for place, tls in (
            (folder / "door", None),
            (Address("127.0.0.1"), None),
            (Address("127.0.0.1"), certificates("ours")),
        ):
            door = await open_door(place, SECRET, echo, tls)
            channel = await connect(door.place, SECRET, 5, tls)
            sent = [b"short", bytes(3 * MAX_FRAME)]
            channel.send(sent)
            assert await receive(channel, 2) == sent
            assert channel.buffered == 0
            with pytest.raises(DoorError):
                await connect(door.place, Secret.draw(), 5, tls)
            channel.close()
            await channel.wait_closed()
            await door.close()

    uvloop.run(main())
