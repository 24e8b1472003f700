"""Messages, cut anyhow, and noise."""

from __future__ import annotations

import random
import struct

import pytest

from divisi.cluster.gang.control.agreement import NOTHING
from divisi.cluster.gang.control.header import Announcement, End, Header, Hello, Message, MessageReader
from divisi.cluster.passes import Pass, PassKind
from divisi.cluster.seats import Seat
from tests.cluster.gang.control.passes import draft, full

MESSAGES: list[Message] = [
    Hello(2**32 - 1, Seat("expert", 3)),
    Announcement(7, 2**63, (2, 1, 512)),
    Announcement(7, 2**64 - 1, NOTHING),
    Announcement(7, 4, (2, 9), second=5),
    Header(7, 9, (draft({1: 2**32 - 1}), *full({0: 1, 2**16 - 1: 5}))),
    Header(7, 9, (draft({}), Pass(PassKind.FULL, {2: 1, 3: 8}, {3: 5}, bucket=64)), trace=b"\0trace" * 4),
    Header(0, 0, full({worker: worker + 1 for worker in range(500)})),
    End(2**32 - 1),
]


def test_messages_survive_any_cutting() -> None:
    data = b"".join(message.encode() for message in MESSAGES)
    for size in (1, 3, 17, len(data)):
        reader = MessageReader()
        got = [message for i in range(0, len(data), size) for message in reader.feed(data[i : i + size])]
        assert got == MESSAGES


def test_a_seat_without_rows_takes_no_room_in_a_header() -> None:
    assert Header(1, 2, full({0: 3, 1: 0})).encode() == Header(1, 2, full({0: 3})).encode()


def raw(kind: int, body: bytes, length: int | None = None) -> bytes:
    """A message of step 0 in epoch 0, of any content."""
    return struct.pack("<BHIQ", kind, len(body) if length is None else length, 0, 0) + body


def raw_header(passes: bytes, num_passes: int = 1) -> bytes:
    return raw(3, bytes([num_passes, 0]) + passes)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"\xff" * 40, "no message of kind 255"),
        (b"GET / HTTP/1.1\r\nHost: divisi\r\n\r\n", "no message of kind 71"),
        (raw(1, b"", 65535), "kind 1 has 65535 bytes"),
        (raw(2, b"", 134), "kind 2 has 134 bytes"),
        (raw(4, b"x"), "kind 4 has 1 bytes"),
        (raw(1, b""), "malformed hello"),
        (raw(1, b"\2\0\0"), "malformed hello"),
        (raw(2, bytes(4)), "malformed announcement"),
        (raw(2, struct.pack("<?II", False, 5, 5)), "has 5 of 5 rows in a second"),
        (raw(3, b"\0"), "malformed header"),
        (raw_header(b"", 0), "0 passes"),
        (raw_header(b"", 255), "has 255 passes, more than"),
        (raw_header(b"", 2), "malformed header"),
        (raw_header(struct.pack("<BHI", 1, 2, 0) + struct.pack("<HIIHII", 0, 1, 0, 0, 9, 0)), "a seat twice, no rows"),
        (raw_header(struct.pack("<BHI", 1, 1, 0) + struct.pack("<HII", 0, 0, 0)), "a seat twice, no rows"),
        (raw_header(struct.pack("<BHI", 1, 1, 0) + struct.pack("<HII", 0, 4, 4)), "or all in a second micro-batch"),
        (raw_header(struct.pack("<BHI", 1, 65535, 0)), "kind 1 and 65535 counts"),
        (raw_header(struct.pack("<BHI", 7, 0, 0)), "kind 7"),
        (raw_header(struct.pack("<BHI", 0, 0, 0)), "1 passes has one of kind 0"),
        (raw_header(struct.pack("<BHI", 1, 0, 0) + b"x"), "1 bytes after them"),
    ],
)
def test_noise_is_told_from_a_message(data: bytes, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        MessageReader().feed(data)


def test_noise_takes_no_memory() -> None:
    """Whatever comes in whatever pieces, it is refused or fits in the longest message."""
    rng = random.Random(4)
    for _ in range(200):
        reader = MessageReader()
        data = bytes([rng.choice((1, 2, 3, 4)), *rng.randbytes(200_000)])
        refused = False
        while data and not refused:
            size = rng.randrange(1, 10_000)
            try:
                reader.feed(data[:size])
            except ValueError:
                refused = True
            else:
                assert len(reader._buffer) <= 65_535 + 15
            data = data[size:]
        assert refused
