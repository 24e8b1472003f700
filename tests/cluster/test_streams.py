"""Streams of one worker: a second request of the same id must not take the first one's events."""

from __future__ import annotations

import pytest

from divisi.cluster.errors import RequestRejected
from divisi.cluster.ray.streams import TokenStreams
from divisi.cluster.request import TokenEvent


async def test_an_id_is_served_once_at_a_time() -> None:
    streams = TokenStreams()
    first = streams.open("a")
    with pytest.raises(RequestRejected, match="'a'"):
        streams.open("a")
    streams.deliver([TokenEvent("a", (1,), None), TokenEvent("b", (9,), None)])
    streams.deliver([TokenEvent("a", (2,), None, finish_reason="length")])
    assert [event.token_ids for event in await first.take()] == [(1,), (2,)]
    streams.close("a")
    streams.open("a")
