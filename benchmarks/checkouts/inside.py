"""Runs inside a checkout, with that checkout's `divisi` and `tests`: serves requests in a gang, or runs timed steps.

Both checkouts run this file, so it touches only what they share: `Request` and `Sampling`, an engine's `submit`,
`cancel`, `plan` and `stats`, and from their tests `thread_gang` and `local_engine`, which know how their
checkout puts an engine together and how it runs a step. Modules that have moved are looked for under both names. What
happens between two steps is hooked in before `Engine.plan`: the one call that every loop makes once per step.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from queue import SimpleQueue
from typing import Any
from unittest import mock

Message = dict[str, Any]
_REQUEST_TIMEOUT_S = 240.0


def main() -> None:
    """Answer one message after another until the parent is gone."""
    threading.excepthook = lambda error: _die(error.exc_value)
    channel = _Channel()
    channel.send(_hello())
    local: Any = None

    def pause(seconds: float) -> None:
        channel.send({"seconds": seconds})
        channel.receive()

    try:
        while True:
            message = channel.receive()
            if message["do"] == "serve":
                channel.send(_serve(message))
            elif message["do"] == "load":
                local = _load(message)
                channel.send({})
            else:
                channel.send(_timed_run(local, message, pause))
    except BaseException as error:  # noqa: BLE001  ends the process, whatever threads it has
        _die(error)


class _Channel:
    """To the parent and back, one JSON message per line. The process ends as soon as the parent has."""

    def __init__(self) -> None:
        self._replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)  # whatever else prints must not come between the replies
        self._messages: SimpleQueue[Message] = SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def send(self, message: Message) -> None:
        self._replies.write(json.dumps(message) + "\n")
        self._replies.flush()

    def receive(self) -> Message:
        return self._messages.get()

    def _read(self) -> None:
        for line in sys.stdin:
            self._messages.put(json.loads(line))
        os._exit(0)


def _hello() -> Message:
    request = _module("divisi.cluster.request")
    names = [field.name for kind in (request.Request, request.Sampling) for field in fields(kind)]
    return {"file": request.__file__, "fields": names}


def _module(*names: str) -> Any:
    """The first of these modules that the checkout has."""
    for name in names[:-1]:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not name.startswith(error.name):
                raise  # it is there, and needs something that isn't
    return importlib.import_module(names[-1])


def _engine_class() -> Any:
    return _module("divisi.cluster.engine.engine", "divisi.cluster.engine").Engine


def _die(error: BaseException | None) -> None:
    """A thread that fails would leave the others waiting: end the process, for its parent to tell."""
    traceback.print_exception(error)
    sys.stderr.flush()
    os._exit(1)


@contextmanager
def _before_plans(hook: Callable[[Any], None]) -> Iterator[None]:
    """Call `hook(engine)` in the engine's thread whenever it is about to plan a step."""
    plan = _engine_class().plan

    def hooked(engine: Any) -> Any:
        try:
            hook(engine)
        except BaseException as error:  # noqa: BLE001  ends the process
            _die(error)
        return plan(engine)

    with mock.patch.object(_engine_class(), "plan", hooked):
        yield


@contextmanager
def _grammars_at_once() -> Iterator[None]:
    """Have a request with a grammar queued as it is submitted, not whenever another thread has compiled it."""
    grammars = _module("divisi.cluster.engine.grammar", "divisi.cluster.grammar").Grammars
    start = grammars.compile

    def compiled(self: Any, grammar: str) -> Future[Any]:
        guide: Future[Any] = start(self, grammar)
        wait([guide])
        return guide

    with mock.patch.object(grammars, "compile", compiled):
        yield


def _request(spec: Message) -> Any:
    """A request of the checkout's own classes."""
    request = _module("divisi.cluster.request")
    values = {name: _frozen(value) for name, value in spec.items()}
    for name in ("stop_ids", "content_stop_ids"):
        if name in values:
            values[name] = frozenset(values[name])
    if "spans" in values:
        span = _module("divisi.cluster.triggers").Span
        values["spans"] = tuple(span(**found) for found in values["spans"])
    return request.Request(**values | {"sampling": request.Sampling(**values["sampling"])})


def _frozen(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(map(_frozen, value))
    return {name: _frozen(item) for name, item in value.items()} if isinstance(value, dict) else value


# Serving requests in a gang


class _Feed:
    """Sends one worker its requests and cancels some, by the number of its steps: never by the clock."""

    def __init__(self, worker: Any, requests: Sequence[Message]) -> None:
        self._worker = worker
        self._coming = sorted(requests, key=lambda request: request["arrives"])
        self._doomed: dict[str, int] = {}
        """Requests that are to be cancelled, and after how many tokens."""
        self._steps = 0

    def before_plan(self) -> None:
        """Cancel what has its tokens, then send what is due; if the worker would idle, what is next."""
        engine = self._worker.engine
        for request_id, count in list(self._doomed.items()):
            events = self._worker.events[request_id]
            if sum(len(event.token_ids) for event in events) >= count:
                del self._doomed[request_id]
                engine.cancel(request_id)
                self._worker.loop.ask(lambda: None)  # wakes the loop, which delivers the event even if all is done
        while self._coming and (self._coming[0]["arrives"] <= self._steps or _is_idle(engine)):
            coming = self._coming.pop(0)
            request = _request(coming["request"])
            engine.submit(request)
            if coming["cancel_after"] is not None:
                self._doomed[request.request_id] = coming["cancel_after"]
        self._steps += 1


def _is_idle(engine: Any) -> bool:
    stats = engine.stats()
    return not stats.running + stats.waiting


def _serve(message: Message) -> Message:
    """Serve all requests in a gang of rank threads; what became of each, and what it took.

    The first plan of every worker waits until all workers have their requests, so that the leader's first header
    holds all of them. From then on each step is agreed between the workers that have work, and nothing of what a step
    holds depends on time.
    """
    gangs = _module("tests.support.thread_gang")
    shape = _module("divisi.cluster.seats", "divisi.cluster.gang.seats").GangShape(*message["shape"])
    spec = gangs.small_spec(Path(message["model_dir"]), shape, **message["spec"])
    feeds: dict[int, _Feed] = {}
    ready = threading.Event()

    def before_plan(engine: Any) -> None:
        if not ready.wait(_REQUEST_TIMEOUT_S):
            raise TimeoutError("the gang was never complete")
        feeds[id(engine)].before_plan()

    requests: list[Message] = message["requests"]
    with _before_plans(before_plan), _grammars_at_once(), gangs.thread_gang(spec) as workers:
        for index, worker in enumerate(workers):
            mine = [request for request in requests if request["group"] % len(workers) == index]
            feeds[id(worker.engine)] = _Feed(worker, mine)
        ready.set()
        answers = {}
        for request in requests:
            name, worker = request["request"]["request_id"], workers[request["group"] % len(workers)]
            worker.finish(name, timeout=_REQUEST_TIMEOUT_S)
            answers[name] = _answer(worker.events[name])
        stats = [worker.engine.stats() for worker in workers]
    return {
        "answers": answers,
        "steps": sum(entry.steps for entry in stats),
        "preemptions": sum(entry.preemptions for entry in stats),
    }


def _answer(events: Sequence[Any]) -> Message:
    """All that a request was told, whatever way its events were cut."""
    told = [event.prompt_logprobs for event in events if event.prompt_logprobs is not None]
    return {
        "tokens": [token for event in events for token in event.token_ids],
        "logprobs": [_logprob(entry) for event in events for entry in event.logprobs or ()],
        "prompt logprobs": [entry and _logprob(entry) for prompt in told for entry in prompt],
        "finish reason": events[-1].finish_reason,
        "stop id": events[-1].stop_id,
        "error": events[-1].error,
    }


def _logprob(entry: Any) -> list[Any]:
    return [entry.token_id, entry.logprob, [list(pair) for pair in entry.top]]


# Timed steps


class _Timer:
    """Stops the time of an engine's steps, and pauses it before every `block` of them, after the first `skip`.

    The first `chunks` of those that are timed are blocks of their own.
    """

    def __init__(self, skip: int, block: int, chunks: int, pause: Callable[[float], None]) -> None:
        self._skip, self._block, self._chunks, self._pause = skip, block, chunks, pause
        self._steps, self._started = 0, 0.0

    def before_plan(self, _engine: Any) -> None:
        """A pause, where one is due, tells the seconds since the last."""
        timed = self._steps - self._skip
        if 0 <= timed < self._chunks or (timed >= 0 and (timed - self._chunks) % self._block == 0):
            self._pause(time.perf_counter() - self._started if timed else 0.0)
            self._started = time.perf_counter()
        self._steps += 1


def _load(message: Message) -> Any:
    """A local engine, with the message's number of threads."""
    torch = _module("torch")
    torch.set_num_threads(message["threads"])
    engines = _module("tests.parity.engines")
    known = inspect.signature(engines.local_engine).parameters
    limits = {name: value for name, value in message["limits"].items() if name in known}
    return engines.local_engine(Path(message["model_dir"]), dtype=getattr(torch, message["dtype"]), **limits)


def _timed_run(local: Any, message: Message, pause: Callable[[float], None]) -> Message:
    """Answer all prompts greedily; the tokens."""
    timer = _Timer(message["skip"], message["block"], message["chunks"], pause)
    with _before_plans(timer.before_plan):
        answers: Mapping[str, Any] = local.greedy(message["prompts"], message["count"])
    return {"tokens": answers}


if __name__ == "__main__":
    main()
