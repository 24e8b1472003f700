"""The comparison of transports, small."""

from __future__ import annotations

import pytest

from divisi.benchmarks.served.transports import CHANNEL, STREAMS_OF_ASYNCIO, Contender, measure, message
from divisi.cluster.streams.wire import Events, decode


def test_the_message_is_a_step_of_64_streams() -> None:
    found = decode(message())
    assert isinstance(found, Events)
    assert len(found.numbers) == len(found.tokens) == 64


@pytest.mark.verify
@pytest.mark.parametrize("contender", [CHANNEL, STREAMS_OF_ASYNCIO], ids=["channel", "streams"])
def test_every_message_arrives_and_takes_time(contender: Contender) -> None:
    assert all(0 < figure < 1e6 for figure in measure(contender, message(), 20))
