"""Admission: limits, the computed Retry-After, timeouts and the end of the server, on a clock that the test moves."""

from __future__ import annotations

import asyncio

import pytest

from divisi.cluster.errors import Overloaded, RequestRejected
from divisi.cluster.request import Request, Sampling
from divisi.deploy.limits import ApiKey, Gate, GateLimits, KeyLimitReached, RequestTimedOut, ServerStopping, Ticket


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def requests(count: int = 1, prompt: int = 10, max_tokens: int = 20) -> list[Request]:
    return [Request(f"r{i}", (1,) * prompt, max_tokens, Sampling()) for i in range(count)]


def held(gate: Gate) -> tuple[int, int]:
    return gate.answers, gate.queued_tokens


async def test_a_burst_does_not_slip_past_the_limit() -> None:
    gate = Gate(GateLimits(max_requests=4))
    tickets: list[Ticket] = []
    for _ in range(4):
        tickets.append(gate.admit(None, requests()).__enter__())
    with pytest.raises(Overloaded, match="4 answers"):
        gate.admit(None, requests())
    tickets[0].__exit__(None, None, None)
    with gate.admit(None, requests()):
        assert held(gate) == (4, 40)
    for ticket in tickets[1:]:
        ticket.__exit__(None, None, None)
    assert held(gate) == (0, 0)
    assert gate.idle.is_set()
    assert not gate.busy.is_set()


async def test_tokens_count_until_their_answer_begins() -> None:
    gate = Gate(GateLimits(max_queued_tokens=30))
    with gate.admit(None, requests(2, prompt=15)) as ticket:
        with pytest.raises(Overloaded, match="30 prompt tokens"):
            gate.check(None)
        ticket.progress(0, 1)
        ticket.progress(0, 5)
        assert gate.queued_tokens == 15
        gate.check(None)
    assert held(gate) == (0, 0)


async def test_a_body_larger_than_the_limit_gets_in_when_there_is_room_for_one() -> None:
    gate = Gate(GateLimits(max_requests=2, max_queued_tokens=5))
    with gate.admit(None, requests(8, prompt=100)):
        assert held(gate) == (8, 800)
        with pytest.raises(Overloaded):
            gate.check(None)


async def test_retry_after_is_what_is_inside_by_the_measured_rate() -> None:
    clock = Clock()
    gate = Gate(GateLimits(max_requests=2, retry_after_s=7), clock)
    assert gate.wait_s() == 7, "nothing was measured yet"
    with gate.admit(None, requests(max_tokens=100)) as first, gate.admit(None, requests(prompt=50, max_tokens=100)):
        for _ in range(10):
            clock.now += 0.5
            first.progress(0, 5)
        # 10 prompt and 50 generated tokens in 5 s; 50 prompt and 200 - 50 generated tokens are left
        assert gate.wait_s() == pytest.approx((50 + 150) / 12)
        with pytest.raises(Overloaded) as caught:
            gate.check(None)
        assert caught.value.retry_after == pytest.approx(200 / 12)
    clock.now += 1000
    with gate.admit(None, requests(max_tokens=100)):
        # the pause is no slowness, and the last answers (50 tokens) say more than what was reserved
        assert gate.wait_s() == pytest.approx((10 + 50) / 12)


async def test_a_refused_request_counts_until_it_may_come_again() -> None:
    clock = Clock()
    gate = Gate(GateLimits(max_requests=1, retry_after_s=2), clock)
    with gate.admit(None, requests(prompt=40)):
        assert gate.refused_tokens == 0
        with pytest.raises(Overloaded):
            gate.check(None)  # before the body is read: as large as those that were let in
        assert gate.refused_tokens == 40 + 64
        clock.now += 1.5
        with pytest.raises(Overloaded):
            gate.admit(None, requests(2, prompt=5))
        assert gate.refused_tokens == 104 + 2 * (5 + 64)
        clock.now += 1
        assert gate.refused_tokens == 138
        clock.now += 2
        assert gate.refused_tokens == 0


async def test_what_a_key_may_not_do_is_no_want_of_room() -> None:
    gate = Gate(GateLimits())
    key = ApiKey("k", "secret", max_concurrent=1)
    with gate.admit(key, requests()), pytest.raises(KeyLimitReached):
        gate.admit(key, requests())
    assert gate.refused_tokens == 0


async def test_a_timeout_ends_the_answer() -> None:
    gate = Gate(GateLimits(request_timeout_s=0.01))
    with gate.admit(None, requests()) as ticket:
        assert isinstance(await ticket.over, RequestTimedOut)
    with gate.admit(None, requests()) as ticket:
        pass
    await asyncio.sleep(0.02)
    assert ticket.over.cancelled(), "the timer of a finished answer still rings"


async def test_the_end_of_the_server_ends_all_answers_once() -> None:
    gate = Gate(GateLimits())
    with gate.admit(None, requests()) as one, gate.admit(None, requests()) as two:
        gate.end_all_in(60)
        gate.end_all_in(0.01)
        gate.end_all_in(60)
        for ticket in (one, two):
            assert isinstance(await ticket.over, ServerStopping)
    with gate.admit(None, requests()) as later:
        await asyncio.sleep(0.02)
        assert not later.over.done(), "a server that came back must serve"


async def test_a_key_has_its_own_concurrency() -> None:
    clock = Clock()
    gate = Gate(GateLimits(replicas=2, retry_after_s=3), clock)
    key, other = ApiKey("a", "h", max_concurrent=3), ApiKey("b", "i")
    with gate.admit(key, requests(2)):
        with pytest.raises(KeyLimitReached, match="'a' has 2 answers") as caught:
            gate.check(key)
        assert caught.value.retry_after == 3, "nothing was measured yet"
        gate.check(other)
        clock.now += 10
    with gate.admit(key, requests(1)):
        gate.check(key)
        with pytest.raises(KeyLimitReached, match="2 more would exceed its limit of 2") as caught:
            gate.admit(key, requests(2))
        assert caught.value.retry_after == pytest.approx(10)
    with pytest.raises(RequestRejected, match=r"3 answers at once.* may have 2"):
        gate.admit(key, requests(3))


async def test_a_key_with_less_than_a_token_a_minute_for_each_replica_gets_its_turn() -> None:
    clock = Clock()
    gate = Gate(GateLimits(replicas=8), clock)
    key = ApiKey("a", "h", tokens_per_minute=3)
    gate.check(key)
    with gate.admit(key, requests(prompt=1)), pytest.raises(KeyLimitReached):
        gate.check(key)
    clock.now += 161
    gate.check(key)


async def test_a_key_pays_for_its_tokens_and_waits_while_in_debt() -> None:
    clock = Clock()
    gate = Gate(GateLimits(), clock)
    key = ApiKey("a", "h", tokens_per_minute=60)
    with gate.admit(key, requests(prompt=50)) as ticket:
        gate.check(key)
        ticket.progress(0, 40)
        with pytest.raises(KeyLimitReached, match="60 tokens per minute") as caught:
            gate.check(key)
        assert caught.value.retry_after == pytest.approx(31)
    clock.now += 30.9
    with pytest.raises(KeyLimitReached):
        gate.check(key)
    clock.now += 0.2
    gate.check(key)
    clock.now += 1000
    with gate.admit(key, requests(prompt=61)):
        pass
    with pytest.raises(KeyLimitReached) as caught:
        gate.check(key)
    assert caught.value.retry_after == pytest.approx(2), "more than a minute's tokens were saved up"
    gate.check(ApiKey("a", "h", tokens_per_minute=600))  # a rate that was raised applies at once
