"""Frames of an open connection: each is authenticated, in its direction and at its place. Bytes in, bytes out.

    length and flag (4 bytes) | parcel (4) | tag (16) | payload

The tag is BLAKE2b of the payload under the direction's key, with the frame's number and its header as the salt: one
call of C that copies nothing. 16 bytes suffice: a forger has one try, since the first wrong tag ends the connection,
and it succeeds once in 2^128. A frame that is changed, repeated, left out or out of place has a wrong tag.

A payload of more than `MAX_FRAME` bytes is a *parcel*: cut into pieces that other frames may go between, and put
together again by the receiver. Payloads are not encrypted here; TLS does that where certificates are given.
"""

from __future__ import annotations

import hmac
import struct
from collections.abc import Iterator
from hashlib import blake2b

from divisi.cluster.door.errors import DoorError

MAX_FRAME = 256 * 1024
MAX_PARCELS_BYTES = 256 * 1024 * 1024
"""Of all parcels that one side has begun and not finished: more than any request, less than a machine."""

_HEADER = struct.Struct("<II")
_SALT = struct.Struct("<QII")
_TAG = 16
_START = _HEADER.size + _TAG
_MORE = 1 << 31


class Framer:
    """Seals what goes out and opens what comes in. Sealed bytes must be sent in the order they were sealed in."""

    def __init__(self, sending_key: bytes, receiving_key: bytes) -> None:
        self._sending_key = sending_key
        self._receiving_key = receiving_key
        self._sent = 0
        self._received = 0
        self._parcels = 0
        self._buffer = bytearray()
        self._open: dict[int, list[bytes]] = {}
        self._open_bytes = 0

    def seal(self, payload: bytes) -> bytes:
        """The frame of a payload of at most `MAX_FRAME` bytes."""
        assert len(payload) <= MAX_FRAME, len(payload)
        return self._seal(payload, len(payload), 0)

    def cut(self, payload: bytes) -> Iterator[bytes]:
        """The frames of a longer payload, each sealed when it is asked for; others may be sealed in between."""
        self._parcels = self._parcels % (_MORE - 1) + 1
        parcel = self._parcels
        for start in range(0, len(payload), MAX_FRAME):
            piece = payload[start : start + MAX_FRAME]
            more = _MORE if start + MAX_FRAME < len(payload) else 0
            yield self._seal(piece, len(piece) | more, parcel)

    def feed(self, data: bytes | memoryview) -> list[bytes]:
        """The payloads that are complete now, in order. Raises DoorError, after which the connection is of no use."""
        buffer = self._buffer
        buffer += data
        payloads: list[bytes] = []
        start, size = 0, len(buffer)
        while size - start >= _START:
            word, parcel = _HEADER.unpack_from(buffer, start)
            length = word & ~_MORE
            if length > MAX_FRAME:
                raise DoorError(f"a frame claims {length} bytes, more than {MAX_FRAME}")
            end = start + _START + length
            if end > size:
                break
            payload = bytes(memoryview(buffer)[start + _START : end])
            tag = _tag(payload, self._receiving_key, self._received, word, parcel)
            if not hmac.compare_digest(tag, buffer[start + _HEADER.size : start + _START]):
                raise DoorError("a frame was changed on its way, or is not the next one")
            self._received += 1
            start = end
            if parcel:
                payloads += self._join(payload, parcel, bool(word & _MORE))
            else:
                payloads.append(payload)
        del buffer[:start]
        return payloads

    def _seal(self, payload: bytes, word: int, parcel: int) -> bytes:
        tag = _tag(payload, self._sending_key, self._sent, word, parcel)
        self._sent += 1
        return b"".join((_HEADER.pack(word, parcel), tag, payload))

    def _join(self, piece: bytes, parcel: int, more: bool) -> list[bytes]:
        """The parcel's payload once its last piece is there."""
        pieces = self._open.setdefault(parcel, [])
        pieces.append(piece)
        self._open_bytes += len(piece)
        if self._open_bytes > MAX_PARCELS_BYTES:
            raise DoorError(f"parcels of more than {MAX_PARCELS_BYTES} bytes are under way at once")
        if more:
            return []
        payload = b"".join(self._open.pop(parcel))
        self._open_bytes -= len(payload)
        return [payload]


def _tag(payload: bytes, key: bytes, number: int, word: int, parcel: int) -> bytes:
    return blake2b(payload, digest_size=_TAG, key=key, salt=_SALT.pack(number, word, parcel)).digest()
