"""An engine client that answers with given tokens, and a real HTTP server around the API for it."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import uvicorn

from divisi.cluster.errors import GangNotReady
from divisi.cluster.request import EndReason, Request, TokenEvent, TokenLogprob
from divisi.cluster.telemetry.process import Telemetry
from divisi.deploy.api import ApiSettings, GangStatus, StatRow, build_app
from divisi.deploy.api.engine_client import GangAdmin
from divisi.deploy.limits import Gate, KeyFile
from divisi.model.text import TextCodec, Tokenizer

Step = TokenEvent | Exception | threading.Event
"""What an engine does next: an event is waited for."""
Script = Callable[[Request], Iterable[Step]]


def logprob_of(token_id: int, top: int) -> TokenLogprob:
    """A made-up but fixed log-probability: the chosen token first, then its neighbours."""
    best = [(token_id + shift, -0.5 - shift) for shift in range(top)]
    return TokenLogprob(token_id, -0.5, tuple(best))


def events_of(request: Request, ids: Sequence[int], *, group: int = 1, end: EndReason = "stop") -> list[TokenEvent]:
    """`ids` as events of `group` tokens, cut at the request's limit, as an engine would send them."""
    reason: EndReason = "length" if len(ids) >= request.max_tokens else end
    ids = ids[: request.max_tokens]
    events = []
    for start in range(0, max(len(ids), 1), group):
        part = tuple(ids[start : start + group])
        wanted = request.logprobs
        logprobs = None if wanted is None else tuple(logprob_of(token, wanted) for token in part)
        prompt_logprobs = None
        if start == 0 and (top := request.prompt_logprobs) is not None:
            prompt_logprobs = (None, *(logprob_of(token, top) for token in request.prompt[1:]))
        events.append(TokenEvent(request.request_id, part, logprobs, prompt_logprobs))
    last = events.pop()
    stop_ids = request.content_stop_ids or request.stop_ids
    stop_id = min(stop_ids) if reason == "stop" and stop_ids else None
    final = TokenEvent(
        last.request_id, last.token_ids, last.logprobs, last.prompt_logprobs, finish_reason=reason, stop_id=stop_id
    )
    return [*events, final]


class FakeEngine:
    """Plays a script per request."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.reset()

    def reset(self) -> None:
        self.script: Script = self.say("Hello, world! 你好 👩‍🚀 naïve")
        self.requests: list[Request] = []
        self.open = 0
        self._idle = threading.Condition()
        self.held: str | None = None  # "before" or "after" the first event, "status", "broken status"
        self.judges_after_s = 0.0
        self.first_sent = threading.Event()
        self.waiting = threading.Event()
        self.closed = threading.Event()
        self.gang = GangStatus(True, "", (StatRow("step_seconds", 1.5, (("part", "mixer"),), "counter"),))

    def say(self, text: str, *, group: int = 1, end: EndReason = "stop") -> Script:
        ids = self.tokenizer.encode(text)
        return lambda request: events_of(request, ids, group=group, end=end)

    async def generate(self, request: Request) -> AsyncGenerator[list[TokenEvent], None]:
        self.loop = asyncio.get_running_loop()
        self.requests.append(request)
        with self._idle:
            self.open += 1
        try:
            if self.held == "before":
                self.waiting.set()
                await asyncio.Event().wait()
            for step in self.script(request):
                await asyncio.sleep(0)
                if isinstance(step, threading.Event):
                    self.waiting.set()
                    await asyncio.to_thread(step.wait, 10)
                    continue
                if isinstance(step, Exception):
                    raise step
                yield [step]
                self.first_sent.set()
                if self.held == "after":
                    self.waiting.set()
                    await asyncio.Event().wait()
        finally:
            with self._idle:
                self.open -= 1
                self._idle.notify_all()
            self.closed.set()

    def all_closed(self, timeout: float) -> bool:
        """Wait until no iterator is open; False when that takes longer."""
        with self._idle:
            return self._idle.wait_for(lambda: self.open == 0, timeout)

    async def check_ready(self) -> None:
        await asyncio.sleep(self.judges_after_s)
        if not self.gang.ready:
            raise GangNotReady(self.gang.reason)

    async def status(self) -> GangStatus:
        if self.held == "status":
            await asyncio.Event().wait()
        if self.held == "broken status":
            raise RuntimeError("no route to the gang")
        return self.gang


@contextmanager
def serve(
    engine: FakeEngine,
    text: TextCodec,
    settings: ApiSettings,
    gate: Gate | None = None,
    keys: KeyFile | None = None,
    telemetry: Telemetry | None = None,
    admin: GangAdmin | None = None,
) -> Iterator[str]:
    """The API on a free port, under uvicorn in a thread; yields its base URL."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(128)
        app = build_app(engine, text, settings, gate, keys, telemetry, admin=admin)
        config = uvicorn.Config(app, log_level="warning", lifespan="off")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
