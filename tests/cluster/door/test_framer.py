"""Frames in memory: cut anywhere, changed, repeated, out of place, too long."""

from __future__ import annotations

import random
import struct

import pytest

from divisi.cluster.door import MAX_FRAME, DoorError
from tests.cluster.door.support import framers


@pytest.mark.parametrize("seed", range(30))
def test_a_stream_may_be_cut_anywhere(seed: int) -> None:
    """Payloads of all sizes, long ones interleaved with short ones, arrive whole; short ones in order."""
    draw = random.Random(seed)
    client, server = framers()
    short = [draw.randbytes(draw.choice((0, 1, 7, 100, 5000))) for _ in range(draw.randrange(1, 30))]
    long = [draw.randbytes(MAX_FRAME * draw.randrange(1, 4) + draw.choice((0, 1, 99))) for _ in range(2)]
    long = [payload for payload in long if len(payload) > MAX_FRAME]
    ways = [(client.seal(payload) for payload in short), *map(client.cut, long)]
    stream = bytearray()
    while ways:
        way = draw.choice(ways)
        if (frame := next(way, None)) is None:
            ways.remove(way)
        else:
            stream += frame
    arrived, start = [], 0
    while start < len(stream):
        end = start + draw.choice((1, 3, 24, 25, 1000, 70_000))
        arrived += server.feed(bytes(stream[start:end]))
        start = end
    assert [payload for payload in arrived if len(payload) <= MAX_FRAME] == short
    assert sorted(payload for payload in arrived if len(payload) > MAX_FRAME) == sorted(long)


@pytest.mark.parametrize("seed", range(40))
def test_a_flipped_bit_ends_the_connection(seed: int) -> None:
    draw = random.Random(seed)
    client, server = framers()
    frame = bytearray(client.seal(draw.randbytes(draw.randrange(0, 60))) + client.seal(b"next") * 2)
    place = draw.randrange(len(frame) // 2)
    frame[place] ^= 1 << draw.randrange(8)
    arrived: list[bytes] = []
    with pytest.raises(DoorError):
        # A longer length waits for more, which then doesn't fit either.
        arrived += server.feed(bytes(frame) + bytes(2 * MAX_FRAME))
    assert arrived == []


def test_a_frame_counts_once() -> None:
    client, server = framers()
    frame = client.seal(b"cancel 7")
    assert server.feed(frame) == [b"cancel 7"]
    with pytest.raises(DoorError, match="not the next one"):
        server.feed(frame)


def test_frames_keep_their_places() -> None:
    client, server = framers()
    first, second = client.seal(b"first"), client.seal(b"second")
    with pytest.raises(DoorError, match="not the next one"):
        server.feed(second + first)


def test_a_missing_frame_is_noticed() -> None:
    client, server = framers()
    client.seal(b"lost")
    with pytest.raises(DoorError):
        server.feed(client.seal(b"second"))


def test_a_frame_is_not_taken_back_by_its_sender() -> None:
    client, _ = framers()
    with pytest.raises(DoorError):
        client.feed(client.seal(b"mine"))


def test_a_piece_belongs_to_its_parcel() -> None:
    """The parcel's number and the mark of the last piece are authenticated, too."""
    for change in (struct.pack("<II", MAX_FRAME | 1 << 31, 2), struct.pack("<II", MAX_FRAME, 1)):
        client, server = framers()
        frame = next(client.cut(bytes(MAX_FRAME + 1)))
        with pytest.raises(DoorError):
            server.feed(change + frame[8:])


def test_a_frame_longer_than_the_limit_is_refused_by_its_header() -> None:
    _, server = framers()
    with pytest.raises(DoorError, match=str(MAX_FRAME + 1)):
        server.feed(struct.pack("<II", MAX_FRAME + 1, 0) + bytes(16))


def test_parcels_under_way_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("divisi.cluster.door.framer.MAX_PARCELS_BYTES", 3 * MAX_FRAME)
    client, server = framers()
    ways = [client.cut(bytes(2 * MAX_FRAME)) for _ in range(4)]
    stream = b"".join(next(way) for way in ways)
    with pytest.raises(DoorError, match="under way at once"):
        server.feed(stream)
