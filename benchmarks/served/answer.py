"""A streamed answer, from the bytes of a connection and when they came."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

_LAST_CHUNK = b"0\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Answer:
    """Times are in seconds since the request was sent."""

    first_s: float
    """The first event with text."""
    last_s: float
    """The last one."""
    longest_gap_s: float
    """The longest time between two of them."""
    events: int
    """With text."""
    tokens: int
    """As the server counts them; where it doesn't, `events`."""
    text: str


def ended(tail: bytes) -> bool:
    """Whether a response in chunks ends with these bytes."""
    return tail.endswith(_LAST_CHUNK)


def read_answer(asked_at: float, pieces: Sequence[tuple[float, bytes]]) -> Answer:
    """`pieces`: when something was read, and what. Raises ValueError where it is no stream of events that ends well."""
    times: list[float] = []
    texts: list[str] = []
    tokens, said_end = 0, False
    for at, event in _events(pieces):
        if event == b"[DONE]":
            said_end = True
            continue
        data = json.loads(event)
        if "error" in data:
            raise ValueError(f"the answer ends with an error: {data['error']}")
        tokens = (data.get("usage") or {}).get("completion_tokens", tokens)
        if text := "".join(_text(choice) for choice in data["choices"]):
            times.append(at - asked_at)
            texts.append(text)
    if not said_end or not times:
        raise ValueError(f"the answer breaks off after {len(times)} events")
    gaps = [after - before for before, after in pairwise(times)]
    return Answer(times[0], times[-1], max(gaps, default=0.0), len(times), tokens or len(times), "".join(texts))


def _text(choice: dict[str, object]) -> str:
    delta = choice.get("delta")
    found = choice.get("text") if delta is None else dict(delta).get("content")  # type: ignore[call-overload]  # JSON: a delta is an object
    return str(found or "")


def _events(pieces: Sequence[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    """The data of each event, with the time of the piece that completed it."""
    head, body, chunks = b"", bytearray(), None
    for at, piece in pieces:
        if chunks is None:
            head += piece
            start, found, piece = head.partition(b"\r\n\r\n")
            if not found:
                continue
            if not start.startswith(b"HTTP/1.1 200"):
                raise ValueError(f"refused: {start.splitlines()[0].decode()} {piece[:300].decode(errors='replace')}")
            chunks = _Chunks(b"transfer-encoding: chunked" in start.lower())
        body += chunks.feed(piece)
        while (end := body.find(b"\n\n")) >= 0:
            event = bytes(body[:end])
            del body[: end + 2]
            if event.startswith(b"data: "):
                yield at, event[6:]


class _Chunks:
    """Takes the framing of chunks away."""

    def __init__(self, chunked: bool) -> None:
        self._chunked = chunked
        self._buffer = bytearray()

    def feed(self, data: bytes) -> bytes:
        """What is complete now."""
        if not self._chunked:
            return data
        self._buffer += data
        body = b""
        while (line := self._buffer.find(b"\r\n")) >= 0:
            size = int(self._buffer[:line].partition(b";")[0], 16)
            if len(self._buffer) < line + 2 + size + 2:
                break
            body += bytes(self._buffer[line + 2 : line + 2 + size])
            del self._buffer[: line + 2 + size + 2]
        return body
