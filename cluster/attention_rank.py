"""An attention worker: loads its weights, takes a seat, and runs the engine in a thread. Knows no Ray."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from functools import partial

from divisi.cluster.activity import StuckCheck
from divisi.cluster.assembly import (
    build_engine,
    dispatch_mode,
    memory_units,
    metered,
    served_config,
    worker_network,
)
from divisi.cluster.dispatch.protocol import AllExperts, DispatchMode
from divisi.cluster.door import Credentials
from divisi.cluster.engine.stats import EngineStats
from divisi.cluster.engine.step.plan import StepPlan
from divisi.cluster.errors import GangNotReady
from divisi.cluster.gang.control.peer import listen
from divisi.cluster.gang.loops.inbox import EpochInbox
from divisi.cluster.gang.loops.worker_loop import WorkerLoop
from divisi.cluster.gang.membership.status import Stats
from divisi.cluster.gang.membership.watch import Candidate, SeatWatch
from divisi.cluster.loading import load_in_thread
from divisi.cluster.post import Post
from divisi.cluster.request import Request, TokenEvent
from divisi.cluster.seats import Address, Seat
from divisi.cluster.spec import GangSpec
from divisi.cluster.streams.places import stream_address, stream_places
from divisi.cluster.streams.server import StreamServer
from divisi.cluster.streams.wire import Report
from divisi.cluster.telemetry.process import Telemetry
from divisi.cluster.telemetry.ranks import WorkerStats, show_worker
from divisi.model.config import ModelConfig

log = logging.getLogger(__name__)

_STATS_EVERY_S = 0.25
_ASK_S = 0.5
_RETIRE_S = 2.0
NewMode = Callable[[GangSpec, ModelConfig, AllExperts | None], DispatchMode]
"""By the experts that the worker holds itself."""


class WorkerFailed(RuntimeError):
    """The step loop has ended by an error; the process has to be replaced."""


class AttentionRank:
    """One attention worker. Implements `streams.server.Worker`; what takes time belongs to the step loop's thread."""

    def __init__(self, spec: GangSpec, post: Post, new_mode: NewMode = dispatch_mode) -> None:
        """Load the weights; blocks until it is done. `new_mode` makes the way that rows reach experts.

        The seat is taken afterwards, in the background; but in a colocated gang first, since it says which experts
        to load.
        """
        self._spec = spec
        host = post.host
        config = served_config(spec)
        self._inbox = EpochInbox()
        self._loading = True
        self._failure: str | None = None
        self._told: EngineStats | None = None
        self._stats = WorkerStats(*memory_units(spec, config))
        self._pushed_at = 0.0
        with contextlib.ExitStack() as stack:
            listener = stack.enter_context(contextlib.closing(listen(host)))
            self._streams = stack.enter_context(contextlib.closing(StreamServer(self)))
            places = self._streams.start(stream_places(host), post.secret, spec.tls)
            telemetry = Telemetry(spec.telemetry, "attention", host)
            stack.callback(telemetry.close)
            address = Address(host, listener.getsockname()[1], stream_address(host, places), telemetry.port)
            candidate = Candidate("attention", address, loads_for_seat=spec.shape.colocated, spec=spec.fingerprint)
            self._watch = SeatWatch(post.connect, candidate, self._inbox, self._changed_stats)
            who, index = f"attention worker {os.getpid()}", 0
            if spec.shape.colocated:
                self._watch.start()
                # Else the seat would be held, by a thread, for as long as a process lives that could not load.
                stack.callback(self._watch.stop, "it could not load")
                seat = self._watch.wait_for_seat()
                who, index = str(seat), seat.index
            with post.reported(who) as report:
                build = partial(build_engine, spec, config, index, report, self._inbox.wake.set)
                self._engine, self._experts = load_in_thread(spec, build)
            self._open = stack.pop_all()
        meter = None if self._experts is None else metered(spec, config, self._experts)
        credentials = Credentials(post.secret, spec.tls)
        mode, network = new_mode(spec, config, meter), worker_network(spec, config, listener, credentials)
        observer = show_worker(telemetry, meter, self)
        self._loop = WorkerLoop[StepPlan](
            self._engine, mode, self._inbox, self._watch, network, self._deliver, observer
        )
        self._loading = False
        self._thread = threading.Thread(target=self._run, name="step-loop", daemon=True)
        self._thread.start()
        if spec.shape.colocated:
            self._watch.loaded()
        else:
            self._watch.start()

    def refusal(self) -> str:
        """See `streams.server.Worker`: without a seat, a request would wait until somebody's becomes free."""
        if self._loading:
            return "this attention worker is still loading"
        if self._failure is not None:
            return f"this attention worker has failed: {self._failure}"
        return "" if self._watch.seat is not None else "this attention worker has no seat in the gang"

    def submit(self, request: Request) -> Future[None]:
        """See `streams.server.Worker`."""
        return self._loop.submit(request)

    def cancel(self, request_id: str) -> None:
        """See `streams.server.Worker`."""
        self._loop.cancel(request_id)

    def report(self) -> Future[Report]:
        """See `streams.server.Worker`."""
        return self._loop.ask(self._report)

    @property
    def last_report(self) -> Report:
        """The queue, as of a moment ago."""
        return self._streams.last_report

    @property
    def refused_tokens(self) -> int:
        """Tokens for which the gang had no room, as of a second ago."""
        return self._watch.refused_tokens

    def check(self) -> None:
        """Raise WorkerFailed once the step loop has ended by an error, or another process has taken its seat."""
        if self._failure is not None:
            raise WorkerFailed(self._failure)
        if self._watch.displaced:
            raise WorkerFailed("another process holds the seat that was this one's")

    def close(self, grace_s: float = 0.0, retire_s: float = _RETIRE_S) -> None:
        """Take nothing new, let open answers go on for `grace_s` at most, and leave the gang: between two steps, where
        that takes no longer than `retire_s`."""
        self._streams.leave(grace_s)
        self._streams.close()
        self._watch.retire(retire_s)
        self._inbox.stop()
        self._thread.join(timeout=self._spec.step_deadline_s)
        self._watch.stop("its replica is shutting down")
        self._open.close()

    @property
    def stuck(self) -> Callable[[], bool]:
        """Whether the step loop hangs, as seen from now on. Nobody waits for a gang of one, whose steps may be long."""
        if self._spec.shape.size == 1:
            return lambda: False
        return StuckCheck(self._inbox.activity, self._spec.patience.stuck_after_s)

    @property
    def seat(self) -> Seat | None:
        """The seat held now."""
        return self._watch.seat

    def step_seconds(self) -> Mapping[str, float]:
        """Time in steps by part, so far. For the step loop's thread."""
        return self._engine.stats().step_seconds

    def stats(self) -> Stats:
        """The numbers as they are now, or in the middle of a long step as they were. From any thread."""
        with contextlib.suppress(FutureTimeout, GangNotReady):
            self._stats.told(self._loop.ask(self._engine.stats).result(timeout=_ASK_S))
        return self._stats.last

    def _report(self) -> Report:
        stats = self._engine.stats()
        free_tokens = stats.free_pages * self._spec.page_size
        return Report(stats.queued_tokens, stats.running + stats.waiting, free_tokens)

    def _run(self) -> None:
        try:
            self._loop.run()
        except Exception as error:  # an engine in an unknown state must not go on; its requests can, elsewhere
            log.exception("the step loop failed")
            self._failure = f"{type(error).__name__}: {error}"
            self._streams.fail()
            self._watch.stop("its step loop failed")

    def _deliver(self, events: Sequence[TokenEvent]) -> None:
        # Numbers first: who has read an answer's end finds the answer in /metrics.
        ended = any(event.finish_reason is not None for event in events)
        if ended and time.monotonic() - self._pushed_at > _STATS_EVERY_S:
            self._pushed_at = time.monotonic()
            self._watch.push_stats(self._stats.told(self._engine.stats()))
        self._streams.deliver(events)

    def _changed_stats(self) -> Stats | None:
        """For the watch's poll: the engine's numbers, None when they are those of the last time."""
        try:
            stats = self._loop.ask(self._engine.stats).result(timeout=_ASK_S)
        except (FutureTimeout, GangNotReady):  # in the middle of a long step, where the next poll asks again; or ended
            return None
        if stats == self._told:
            return None
        self._told = stats
        return self._stats.told(stats)
