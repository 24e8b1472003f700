"""A worker's end: takes requests from the ingresses and sends them each step's events. Imports neither Ray nor torch.

One thread with an event loop serves all connections, beside the step loop's, which hands over a step's events as one
list. To each connection they leave as one message.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Literal, Protocol

from divisi.cluster.door import Channel, ChannelClosed, Door, Place, Secret, TlsFiles, open_door
from divisi.cluster.errors import DivisiError, GangNotReady, RequestRejected
from divisi.cluster.request import Request, TokenEvent
from divisi.cluster.streams.wire import Cancel, Events, Message, Refused, Report, Submit, WireError, decode, encode

log = logging.getLogger(__name__)

_REPORT_EVERY_S = 0.25
_BEAT_EVERY_S = 1.0
_MUCH_UNSENT = 2**20
_STUCK_S = 20.0
"""An ingress that has much unsent and takes nothing of it for so long loses its connection, and its answers end."""
_MAX_EARLY = 1024
_START_S = 10.0
_STOP_S = 5.0


class Worker(Protocol):
    """What answers the requests. Called in the server's thread; no call may block."""

    def refusal(self) -> str:
        """Why no request is taken now; empty where one is."""
        ...

    def submit(self, request: Request) -> Future[None]:
        """Begin an answer, whose events go to `StreamServer.deliver`. The future may carry RequestRejected."""
        ...

    def cancel(self, request_id: str) -> None:
        """End an answer, if it is there."""
        ...

    def report(self) -> Future[Report]:
        """The queue as it is now. The future may carry GangNotReady."""
        ...


class _Ingress:
    """A connection, and its answers that have not ended: request ids by number."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.answers: dict[int, str] = {}
        self.cancelled_early: dict[int, None] = {}
        self._given = self._taken = 0
        self._taken_at = time.monotonic()

    def tell(self, *messages: bytes) -> None:
        try:
            self.channel.send(messages)
        except ChannelClosed:
            return  # its receiver clears up
        self._given += sum(map(len, messages))
        now, unsent = time.monotonic(), self.channel.buffered
        if unsent <= _MUCH_UNSENT or self._given - unsent > self._taken:
            self._taken, self._taken_at = self._given - unsent, now
        elif now - self._taken_at > _STUCK_S:
            log.warning("the ingress %s has read nothing for %g s; its connection ends", self.channel.peer, _STUCK_S)
            self.channel.abort()


class StreamServer:
    """Serves the answers of one worker to the ingresses, until closed."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="streams", daemon=True)
        self._started: Future[None] = Future()
        self._places: list[Place] = []
        self._ingresses: set[_Ingress] = set()
        self._answers: dict[str, tuple[_Ingress, int]] = {}
        self._last = Report(0, 0, 0)
        self._told = self._last
        self._stirred = asyncio.Event()
        self._leaving = False
        self._empty = threading.Event()
        self._stop = asyncio.Event()

    # For the threads of the worker.

    def start(self, places: Sequence[Place], secret: Secret, tls: TlsFiles | None = None) -> list[Place]:
        """Open a door at each place; returns the places with the ports that they got. Raises DoorError."""
        self._open = partial(open_door, secret=secret, accept=self._serve, tls=tls)
        self._places = list(places)
        self._thread.start()
        self._started.result(timeout=_START_S)
        return self._places

    def deliver(self, events: Sequence[TokenEvent]) -> None:
        """Send the events of a step. Returns at once, whatever the ingresses do."""
        self._call(self._publish, events)

    def leave(self, grace_s: float) -> None:
        """Take nothing new and say so, and wait until no answer is open, `grace_s` at most.

        The ingresses take their answers elsewhere, as soon as there is another worker.
        """
        self._call(self._begin_to_leave)
        self._empty.wait(grace_s)

    def fail(self) -> None:
        """Hand the open answers back: this worker cannot go on with any."""
        self._call(self._hand_back, "failed", "the attention worker failed")

    def close(self) -> None:
        """Hand the open answers back, for another worker to go on with, and end all connections."""
        self._call(self._stop.set)
        if self._thread.is_alive():
            self._thread.join(_STOP_S)
        self._empty.set()

    @property
    def last_report(self) -> Report:
        """The queue as the ingresses were told of it."""
        return self._last

    def _call(self, call: Callable[..., object], *arguments: object) -> None:
        with contextlib.suppress(RuntimeError):  # it is closed, and nobody listens any more
            self._loop.call_soon_threadsafe(call, *arguments)

    # All else is the server's own thread.

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._main())

    async def _main(self) -> None:
        doors: list[Door] = []
        try:
            for place in self._places:
                doors.append(await self._open(place))
        except DivisiError as error:
            self._started.set_exception(error)
        else:
            self._places = [door.place for door in doors]
            self._started.set_result(None)
            telling = [asyncio.create_task(self._report()), asyncio.create_task(self._beat())]
            await self._stop.wait()
            for task in telling:
                task.cancel()
            self._leaving = True
            self._hand_back("left", "the attention worker has left")
        finally:
            for door in doors:
                await door.close()

    async def _serve(self, channel: Channel) -> None:
        """One connection. Raises ChannelClosed at its end."""
        ingress = _Ingress(channel)
        self._ingresses.add(ingress)
        ingress.tell(encode(self._current()))
        self._stirred.set()
        try:
            while True:
                for payload in await channel.receive():
                    self._handle(ingress, decode(payload))
        except WireError as error:
            log.warning("the connection to %s ends: %s", channel.peer, error)
        finally:
            self._ingresses.discard(ingress)
            for request_id in ingress.answers.values():
                self._forget(request_id)
                self._worker.cancel(request_id)

    def _handle(self, ingress: _Ingress, message: Message) -> None:
        match message:
            case Submit():
                self._submit(ingress, message)
            case Cancel(number, before_its_request):
                request_id = ingress.answers.pop(number, None)
                if request_id is not None:
                    self._forget(request_id)
                    self._worker.cancel(request_id)
                elif before_its_request:
                    ingress.cancelled_early[number] = None
                    while len(ingress.cancelled_early) > _MAX_EARLY:
                        del ingress.cancelled_early[next(iter(ingress.cancelled_early))]
            case _:
                raise WireError(f"an ingress sends no {type(message).__name__}")

    def _submit(self, ingress: _Ingress, message: Submit) -> None:
        number, request = message.number, message.request
        if number in ingress.cancelled_early:
            del ingress.cancelled_early[number]
            return
        if refusal := self._refusal():
            ingress.tell(encode(Refused.by(number, GangNotReady(refusal))))
            return
        if request is None:
            ingress.tell(encode(Refused.by(number, RequestRejected(message.refusal))))
            return
        if request.request_id in self._answers or number in ingress.answers:
            error = RequestRejected(f"request id {request.request_id!r} is already being served")
            ingress.tell(encode(Refused.by(number, error)))
            return
        request = replace(request, arrived=time.monotonic() - message.age_s)
        self._answers[request.request_id] = (ingress, number)
        ingress.answers[number] = request.request_id
        self._stirred.set()
        submitted = self._worker.submit(request)
        submitted.add_done_callback(lambda done: self._submitted(request.request_id, done))

    def _submitted(self, request_id: str, done: Future[None]) -> None:
        """In any thread: the worker has taken a request, or not."""
        if not done.cancelled() and (error := done.exception()) is not None:
            self._call(self._refuse, request_id, error)

    def _refuse(self, request_id: str, error: BaseException) -> None:
        if (found := self._answers.get(request_id)) is not None:
            ingress, number = found
            del ingress.answers[number]
            self._forget(request_id)
            ingress.tell(encode(Refused.by(number, error)))

    def _hand_back(self, why: Literal["left", "failed"], text: str) -> None:
        for request_id, (ingress, number) in list(self._answers.items()):
            del ingress.answers[number]
            self._forget(request_id)
            self._worker.cancel(request_id)
            ingress.tell(encode(Refused(number, why, text)))

    def _forget(self, request_id: str) -> None:
        self._answers.pop(request_id, None)
        self._stirred.set()
        if self._leaving and not self._answers:
            self._empty.set()

    def _publish(self, events: Sequence[TokenEvent]) -> None:
        """Sort a step's events by connection."""
        told: dict[_Ingress, Events] = {}
        for event in events:
            found = self._answers.get(event.request_id)
            if found is None:
                continue  # cancelled meanwhile
            ingress, number = found
            if event.prompt_logprobs is not None:  # perhaps long: alone, so that nothing else has to wait for it
                alone = Events()
                alone.add(number, event)
                ingress.tell(*alone.messages())
            else:
                if (batch := told.get(ingress)) is None:
                    batch = told[ingress] = Events()
                batch.add(number, event)
            if event.finish_reason is not None:
                del ingress.answers[number]
                self._forget(event.request_id)
        for ingress, batch in told.items():
            ingress.tell(*batch.messages())
        self._stirred.set()

    def _refusal(self) -> str:
        return "this attention worker is leaving" if self._leaving else self._worker.refusal()

    def _current(self) -> Report:
        return replace(self._last, refusal=self._refusal(), leaving=self._leaving)

    def _tell_all(self, again: bool = False) -> None:
        if (report := self._current()) != self._told or again:
            self._told = report
            for ingress in list(self._ingresses):
                ingress.tell(encode(report))

    async def _beat(self) -> None:
        """Show that this process lives, however long a step takes."""
        while True:
            await asyncio.sleep(_BEAT_EVERY_S)
            self._tell_all(again=True)

    def _begin_to_leave(self) -> None:
        self._leaving = True
        if not self._answers:
            self._empty.set()
        self._tell_all()

    async def _report(self) -> None:
        """Tell the ingresses how long the queue is, as often as it changes and not more than that."""
        while True:
            try:
                await asyncio.wait_for(self._stirred.wait(), 2 * _REPORT_EVERY_S)
                self._stirred.clear()
                if not self._refusal():
                    self._last = await asyncio.wrap_future(self._worker.report())
            except (TimeoutError, GangNotReady):
                pass  # nothing has happened, or it has stopped, which its refusal says
            self._tell_all()
            await asyncio.sleep(_REPORT_EVERY_S)
