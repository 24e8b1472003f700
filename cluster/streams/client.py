"""An ingress's end of a connection to a worker, and the streams of its open answers. Imports neither Ray nor torch.

The loop wakes once for all that a worker's step brought, and each answer that got something once more.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Callable

from divisi.cluster.door import MAX_FRAME, Channel, ChannelClosed
from divisi.cluster.errors import DivisiError, GangNotReady, WorkerLeft, WorkerLost
from divisi.cluster.request import Request, TokenEvent
from divisi.cluster.streams.death import is_ending
from divisi.cluster.streams.wire import Cancel, Events, Refused, Report, Submit, WireError, decode, encode

log = logging.getLogger(__name__)

MAX_UNREAD = 32_768
"""Tokens of an answer, alternatives counted, that may wait for its reader."""
_LOOK_EVERY_S = 0.02
SILENT_S = 3.0
"""A worker that says nothing for so long, not even that it lives, is stopped or cut off."""
_LATE_S = 0.5
"""An ingress that has not looked for so long was idle or stopped: what workers said meanwhile may wait to be read."""


class TokenStream:
    """The events of one answer that nobody has taken yet. For one reader."""

    def __init__(self, request: Request) -> None:
        self.request_id = request.request_id
        self.number = 0
        """What its connection calls it."""
        self.long = False
        """Whether its request may be overtaken by what is sent after it."""
        self._owes_prompt = request.prompt_logprobs is not None
        self._held: list[TokenEvent] = []
        """Events that have overtaken the first, which tells the whole prompt."""
        self._events: list[TokenEvent] = []
        self._unread = 0
        self._refusal: DivisiError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self.ended = False
        """Whether the last event has come, read or not."""

    def put(self, event: TokenEvent) -> bool:
        """Add an event. False once more is unread than may be: the answer has then ended with an error."""
        if self._owes_prompt and event.finish_reason not in ("error", "rejected", "lost", "cancelled"):
            if event.prompt_logprobs is None:
                self._held.append(event)
                return True
            self._owes_prompt = False
            self._events += [event, *self._held]
        else:
            self._events.append(event)
        self._unread += len(event.token_ids)
        if event.logprobs is not None:
            self._unread += sum(len(told.top) for told in event.logprobs)
        self.ended = self._events[-1].finish_reason is not None
        self._wake()
        if self._unread <= MAX_UNREAD or self.ended:
            return True
        self.fail(f"the answer was read too slowly: more than {MAX_UNREAD} tokens waited for the client")
        return False

    def fail(self, text: str) -> None:
        """End the answer with an error, after what has come."""
        if not self.ended:
            self._events.append(TokenEvent(self.request_id, (), None, finish_reason="error", error=text))
            self.ended = True
            self._wake()

    def refuse(self, error: DivisiError) -> None:
        """There will be no answer, or no more of it than has come."""
        self._refusal, self.ended = error, True
        self._wake()

    async def take(self) -> list[TokenEvent]:
        """All events since the last call, at least one. Raises the worker's refusal, after what has come."""
        while not self._events:
            if self._refusal is not None:
                raise self._refusal
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        events, self._events, self._unread = self._events, [], 0
        return events

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class WorkerConnection:
    """The connection to one worker."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._process = channel.process
        self._watching: asyncio.Task[None] | None = None
        self._numbers = itertools.count(1)
        self._streams: dict[int, TokenStream] = {}
        self._changed: Callable[[], None] = lambda: None
        self._heard_at = 0.0
        self.is_silent = False
        """Whether the worker has said nothing for `SILENT_S` while it had answers to compute."""
        self.report: Report | None = None
        """The worker's last."""
        self.reported_at = 0.0
        """When it came, in seconds of the monotonic clock."""

    async def run(self, changed: Callable[[], None]) -> None:
        """Receive until the connection ends; its answers are lost then.

        `changed` is called with every report, and while the worker is silent.
        """
        self._changed = changed
        try:
            while True:
                payloads = await self._channel.receive()
                self._heard_at, self.is_silent = time.monotonic(), False
                for payload in payloads:
                    match decode(payload):
                        case Events() as events:
                            self._sort(events)
                        case Report() as report:
                            self.report, self.reported_at = report, self._heard_at
                            changed()
                        case Refused(number) as refused:
                            if (stream := self._streams.pop(number, None)) is not None:
                                stream.refuse(refused.error())
                        case other:
                            raise WireError(f"a worker sends no {type(other).__name__}")
        except ChannelClosed:
            log.debug("%s: its connection has ended", self._channel.peer)
        except WireError as error:
            log.warning("the connection to %s ends: %s", self._channel.peer, error)
        finally:
            self.report = None
            self._channel.close()
            if self._watching is not None:
                self._watching.cancel()
            for stream in self._streams.values():
                stream.refuse(WorkerLost("the attention worker was lost"))
            self._streams.clear()

    def open(self, request: Request) -> TokenStream:
        """Send a request. Raises GangNotReady when the connection has ended."""
        stream = TokenStream(request)
        stream.number = next(self._numbers)
        payload = encode(Submit(stream.number, request, age_s=time.monotonic() - request.arrived))
        stream.long = len(payload) > MAX_FRAME
        try:
            self._channel.send([payload])
        except ChannelClosed as error:
            raise GangNotReady(str(error)) from error
        self._streams[stream.number] = stream
        if self._watching is None or self._watching.done():
            self._watching = asyncio.create_task(self._watch())
        return stream

    def close(self, stream: TokenStream) -> None:
        """Forget an answer; unless it has ended, so does the worker, within a step."""
        if self._streams.pop(stream.number, None) is not None:
            self._cancel(stream)

    def hand_over(self) -> None:
        """Have all answers go on elsewhere; the worker drops them."""
        reason: DivisiError = WorkerLeft("the attention worker is leaving")
        if self.is_silent:
            reason = WorkerLost(f"the attention worker has said nothing for {SILENT_S:g} s")
        for stream in self._streams.values():
            self._cancel(stream)
            stream.refuse(reason)
        self._streams.clear()

    def _cancel(self, stream: TokenStream) -> None:
        with contextlib.suppress(ChannelClosed):
            self._channel.send([encode(Cancel(stream.number, stream.long))])

    async def _watch(self) -> None:
        """While answers are open: end the connection as soon as the worker's process is being ended; notice silence."""
        looked_at = 0.0
        while self._streams:
            now = time.monotonic()
            if now - looked_at > _LATE_S:
                self._heard_at = now
            looked_at = now
            if self._process is not None and is_ending(self._process):
                self._channel.abort()
            elif now - self._heard_at > SILENT_S:
                self.is_silent = True
                self._changed()
            await asyncio.sleep(_LOOK_EVERY_S)

    def _sort(self, events: Events) -> None:
        streams = self._streams
        for place, number in enumerate(events.numbers):
            stream = streams.get(number)
            if stream is None:
                continue  # cancelled, and the worker does not know yet
            in_time = stream.put(events.event(place, stream.request_id))
            if stream.ended:
                del streams[number]
                if not in_time:
                    self._cancel(stream)
