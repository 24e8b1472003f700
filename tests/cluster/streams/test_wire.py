"""Messages between an ingress and a worker come back as they were, and nonsense is refused."""

from __future__ import annotations

import math
import random
import re
from dataclasses import replace

import msgpack
import pytest

from divisi.cluster.door import MAX_FRAME
from divisi.cluster.errors import GangNotReady, RequestRejected
from divisi.cluster.request import Request, Sampling, TokenEvent, TokenLogprob
from divisi.cluster.streams.wire import Cancel, Events, Message, Refused, Report, Submit, WireError, decode, encode

SAMPLING = Sampling(0.7, 5, 0.9, 2**64 - 1, 0.1, 1.5, -0.5, 0.25, ((3, -1e9), (9, 4.5)), (1, 2, 9), ((4,), (5, 6)))
FULL = Request("a", (1, 2, 300_000), 7, SAMPLING, frozenset({0, 9}), 0, 3, 2, "start: /x/", answered=(5, 200_000))
PLAIN = Request("b", (0,), 1, Sampling())
LOGPROB = TokenLogprob(5, -0.1, ((5, -0.1), (7, -math.inf)))


@pytest.mark.parametrize(
    "message",
    [Submit(1, FULL), Submit(2**40, PLAIN, age_s=1.5), Cancel(3), Cancel(4, True), Refused(5, "rejected", "too long"),
     Refused(6, "left", "gone"), Report(4, 2, 100), Report(0, 0, 0, "no seat"), Report(1, 1, 1, "leaving", True)],
    ids=lambda message: type(message).__name__,
)  # fmt: skip
def test_messages_come_back(message: Message) -> None:
    assert decode(encode(message)) == message


def test_a_seed_counts_modulo_two_to_the_64() -> None:
    request = replace(PLAIN, sampling=Sampling(seed=-1))
    assert decode(encode(Submit(1, request))) == Submit(1, replace(PLAIN, sampling=Sampling(seed=2**64 - 1)))


CUT_OFF = encode(Submit(1, FULL))[:-1]
EVENTS = [
    TokenEvent("a", (1,), None),
    TokenEvent("b", (), None, finish_reason="error", error="the worker failed"),
    TokenEvent("c", (151_935, 0), (LOGPROB, replace(LOGPROB, top=())), None, "stop", None, 9),
    TokenEvent("d", (4, 5, 6), None, drafted=11, accepted=7, index=70_000),
    TokenEvent("e", (), (), (None, LOGPROB), "length", drafted=3),
]


def columns(events: list[TokenEvent]) -> Events:
    made = Events()
    for number, event in enumerate(events):
        made.add(number, event)
    return made


def test_events_come_back_in_order() -> None:
    found = decode(encode(columns(EVENTS)))
    assert isinstance(found, Events)
    assert list(found.numbers) == list(range(len(EVENTS)))
    assert [found.event(place, event.request_id) for place, event in enumerate(EVENTS)] == EVENTS


def test_a_plain_token_takes_few_bytes() -> None:
    """64 streams of one token each: a step's message is smaller than a packet."""
    assert len(encode(columns([TokenEvent("x", (100_000,), None)] * 64))) < 512


def test_what_has_to_keep_its_order_is_never_long() -> None:
    logprobs = (TokenLogprob(5, -0.1, tuple((token, -1.5) for token in range(20))),)
    events = [TokenEvent(str(number), (number,), logprobs) for number in range(2000)]
    messages = list(columns(events).messages())
    assert len(messages) > 1
    assert max(map(len, messages)) <= MAX_FRAME
    parts = [part for message in messages if isinstance(part := decode(message), Events)]
    found = [(number, part.event(place, str(number))) for part in parts for place, number in enumerate(part.numbers)]
    assert found == list(enumerate(events))


@pytest.mark.parametrize("error", [RequestRejected("too long"), GangNotReady("no seat")])
def test_a_refusal_keeps_its_kind(error: Exception) -> None:
    found = Refused.by(1, error).error()
    assert (type(found), str(found)) == (type(error), str(error))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [({"max_tokens": "many"}, "max_tokens: .* it is 'many'"), ({"sampling": {"top_k": None}}, r"sampling.top_k: "),
     ({"request_id": 5}, "request_id: "), ({"stop_ids": [1.5]}, r"stop_ids.0: "), ({"nonsense": 1}, None)],
)  # fmt: skip
def test_a_request_of_the_wrong_kind_is_refused_by_its_field(changes: dict[str, object], complaint: str | None) -> None:
    *head, fields = msgpack.unpackb(encode(Submit(1, FULL)))
    found = decode(msgpack.packb((*head, fields | changes)))
    assert isinstance(found, Submit)
    if complaint is None:  # a field of a later version
        assert found.request == FULL
    else:
        assert found.request is None
        assert re.match(complaint, found.refusal), found.refusal


@pytest.mark.parametrize("data", [b"", b"\x91\x01", b"\xc0", b"\x93\x63\x80\x01", b"\x80", CUT_OFF])
def test_nonsense_is_an_error(data: bytes) -> None:
    with pytest.raises(WireError):
        decode(data)


def test_random_bytes_are_an_error_or_a_message() -> None:
    rng = random.Random(4)
    valid = [encode(message) for message in (Submit(1, FULL), columns(EVENTS), Refused(1, "rejected", "x"))]
    for turn in range(3000):
        data = bytearray(rng.choice(valid))
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            decode(bytes(data))
        except WireError:
            continue
        except Exception as error:
            raise AssertionError(f"seed 4, turn {turn}: {bytes(data)!r}") from error
