"""Admission of one ingress replica: what is let in, what it holds, and when it has to end.

The gate is open while less than its limits is inside. A body is let in as a whole, with all its prompts and choices:
were it measured against the room that is left, a large one would starve among small ones. Other refusals would be
arbitrary, too, so that what is inside exceeds a limit by one body at most.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType

from divisi.cluster.errors import DivisiError, Overloaded
from divisi.cluster.request import Request
from divisi.deploy.limits.drain_rate import DrainRate
from divisi.deploy.limits.errors import RequestTimedOut, ServerStopping
from divisi.deploy.limits.key_use import KeyUses
from divisi.deploy.limits.keys import ApiKey
from divisi.deploy.limits.refusals import Refusals
from divisi.deploy.routing import TOKENS_PER_REQUEST

_LONGEST_WAIT_S = 600.0


@dataclass(frozen=True, slots=True)
class GateLimits:
    """This replica's share of the deployment's limits. None is no limit."""

    max_requests: int | None = None
    """Answers that may be unfinished at once."""
    max_queued_tokens: int | None = None
    """Prompt tokens of admitted requests that have no token of their answer yet."""
    request_timeout_s: float | None = None
    retry_after_s: float = 1.0
    """What a refusal says before anything was measured."""
    replicas: int = 1
    """Ingress replicas among which the limits of a key are shared out."""


class Ticket:
    """One admitted body. Used as a context; whatever it held is free when the context ends."""

    def __init__(self, gate: Gate, key: ApiKey | None, requests: Sequence[Request]) -> None:
        self._gate = gate
        self._key = key
        self._requests = requests
        self._begun: set[int] = set()
        self._since = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self.over: asyncio.Future[DivisiError] = asyncio.get_running_loop().create_future()
        """Done when the answer has to end before it is complete; holds the reason."""
        self.queued_tokens = sum(len(request.prompt) for request in requests)
        self.answers = len(requests)
        self.reserved = sum(request.max_tokens for request in requests)
        self.generated = 0

    def __enter__(self) -> Ticket:
        self._since = self._gate.enter(self, self._key)
        if (limit := self._gate.limits.request_timeout_s) is not None:
            text = f"the answer was not complete within {limit:g} s; ask for fewer tokens, or have the limit raised"
            self._timer = asyncio.get_running_loop().call_later(limit, self.end, RequestTimedOut(text))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self.over.cancel()
        self._gate.leave(self, self._key, self._since, finished=kind is None)

    def progress(self, index: int, tokens: int) -> None:
        """Answer `index` has so many tokens more; with its first progress its prompt has been computed."""
        prompt = 0
        if index not in self._begun:
            self._begun.add(index)
            prompt = len(self._requests[index].prompt)
            self.queued_tokens -= prompt
        self.generated += tokens
        self._gate.done(self._key, prompt, tokens)

    def end(self, reason: DivisiError) -> None:
        """Make `over` done."""
        if not self.over.done():
            self.over.set_result(reason)


class Gate:
    """Counts what is inside. Belongs to one event loop; `clock` is monotonic seconds."""

    def __init__(self, limits: GateLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self.limits = limits
        self._clock = clock
        self._keys = KeyUses(limits.replicas, limits.retry_after_s, clock)
        self._rate = DrainRate(clock)
        self._refusals = Refusals(clock)
        self._tickets: set[Ticket] = set()
        self._answers = 0
        self._queued_tokens = 0
        self._reserved = 0
        self._generated = 0
        self._mean_answer: float | None = None
        self._mean_tokens: float | None = None
        """Queued tokens of a body."""
        self._end_at = math.inf
        self._ending: asyncio.TimerHandle | None = None
        self.busy = asyncio.Event()
        """Set while anything is inside."""
        self.idle = asyncio.Event()
        """Set while nothing is."""
        self.idle.set()

    @property
    def answers(self) -> int:
        """Unfinished answers inside."""
        return self._answers

    @property
    def queued_tokens(self) -> int:
        """Prompt tokens inside whose answers have not begun."""
        return self._queued_tokens

    @property
    def refused_tokens(self) -> int:
        """What requests would bring that found no room and may come again: prompts, and something for answers."""
        return self._refusals.tokens()

    def check(self, key: ApiKey | None) -> None:
        """Raise Overloaded where nothing can be let in now; costs next to nothing."""
        self._check(key, round(self._mean_tokens or 0) + TOKENS_PER_REQUEST)

    def admit(self, key: ApiKey | None, requests: Sequence[Request]) -> Ticket:
        """A ticket, to be entered at once.

        Raises Overloaded like `check`, and RequestRejected where the key never allows so much.
        """
        if key is not None:
            self._keys.check_size(key, len(requests))
        self._check(key, sum(len(request.prompt) + TOKENS_PER_REQUEST for request in requests))
        return Ticket(self, key, requests)

    def wait_s(self) -> float:
        """Seconds in which what is inside will have been served, by the measured rate."""
        rate = self._rate.per_second()
        if not rate:
            return self.limits.retry_after_s
        mean = self._mean_answer
        expected = self._reserved if mean is None else min(self._reserved, self._answers * mean)
        backlog = self._queued_tokens + max(expected - self._generated, self._answers)
        return min(max(backlog / rate, 1.0), _LONGEST_WAIT_S)

    def end_all_in(self, seconds: float) -> None:
        """End what is inside then, because the server stops. An earlier end stands.

        Meanwhile others may still be let in: that the gang takes nothing new is its status's to say.
        """
        at = self._clock() + seconds
        if at >= self._end_at:
            return
        self._end_at = at
        if self._ending is not None:
            self._ending.cancel()
        self._ending = asyncio.get_running_loop().call_later(max(seconds, 0), self._end_all)

    def enter(self, ticket: Ticket, key: ApiKey | None) -> float:
        """For Ticket: count it; returns the time."""
        if not self._tickets:
            self._rate.start()
            self.busy.set()
            self.idle.clear()
        self._tickets.add(ticket)
        self._answers += ticket.answers
        self._queued_tokens += ticket.queued_tokens
        self._mean_tokens = _mean(self._mean_tokens, ticket.queued_tokens)
        self._reserved += ticket.reserved
        if key is not None:
            self._keys.enter(key, ticket.answers, ticket.queued_tokens)
        return self._clock()

    def done(self, key: ApiKey | None, prompt: int, tokens: int) -> None:
        """For Ticket: so many tokens of a prompt and of its answer are done."""
        self._queued_tokens -= prompt
        self._generated += tokens
        self._rate.add(prompt + tokens)
        if key is not None:
            self._keys.charge(key, tokens)

    def leave(self, ticket: Ticket, key: ApiKey | None, since: float, *, finished: bool) -> None:
        """For Ticket: forget it."""
        self._tickets.discard(ticket)
        self._answers -= ticket.answers
        self._queued_tokens -= ticket.queued_tokens
        self._reserved -= ticket.reserved
        self._generated -= ticket.generated
        if key is not None:
            self._keys.leave(key, ticket.answers, self._clock() - since)
        if finished and ticket.generated:
            mean = ticket.generated / ticket.answers
            self._mean_answer = _mean(self._mean_answer, mean)
        if not self._tickets:
            self._rate.pause()
            self.busy.clear()
            self.idle.set()

    def _check(self, key: ApiKey | None, tokens: int) -> None:
        """`tokens`: what the request would bring."""
        if key is not None:
            self._keys.check(key)
        limits, reason = self.limits, ""
        if limits.max_requests is not None and self._answers >= limits.max_requests:
            reason = f"{self._answers} answers are being served or queued, which is the limit"
        elif limits.max_queued_tokens is not None and self._queued_tokens >= limits.max_queued_tokens:
            reason = f"{self._queued_tokens} prompt tokens are queued, which is over the limit"
        if reason:
            wait_s = self.wait_s()
            self._refusals.add(tokens, wait_s)
            raise Overloaded(reason, wait_s)

    def _end_all(self) -> None:
        self._end_at = math.inf
        for ticket in list(self._tickets):
            ticket.end(ServerStopping("the server stopped before the answer was complete; send the request again"))


def _mean(former: float | None, value: float) -> float:
    """That of the last ten or so."""
    return value if former is None else 0.9 * former + 0.1 * value
