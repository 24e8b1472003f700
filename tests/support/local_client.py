"""An engine in this process as the HTTP API sees it: the step loop in a thread, without a gang and without Ray."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from pathlib import Path

from divisi.cluster.assembly import build_engine, served_config
from divisi.cluster.dispatch.local import LocalEnd
from divisi.cluster.engine.engine import Engine
from divisi.cluster.request import Request, TokenEvent
from divisi.cluster.seats import GangShape
from divisi.cluster.spec import GangSpec
from divisi.deploy.api import GangStatus
from divisi.model.dispatcher import Dispatcher


class LocalClient:
    """Implements `divisi.deploy.api.engine_client.EngineClient`. All calls of the engine are under one lock."""

    def __init__(self, engine: Engine, dispatcher: Dispatcher, changed: threading.Condition) -> None:
        self._engine, self._dispatcher = engine, dispatcher
        self._changed = changed
        self._streams: dict[str, tuple[asyncio.AbstractEventLoop, asyncio.Queue[TokenEvent]]] = {}
        self._closing = False

    async def generate(self, request: Request) -> AsyncGenerator[list[TokenEvent], None]:
        queue: asyncio.Queue[TokenEvent] = asyncio.Queue()
        with self._changed:
            self._engine.submit(request)
            self._streams[request.request_id] = asyncio.get_running_loop(), queue
            self._changed.notify()
        try:
            while True:
                event = await queue.get()
                yield [event]
                if event.finish_reason is not None:
                    return
        finally:
            with self._changed:
                del self._streams[request.request_id]
                self._engine.cancel(request.request_id)

    async def check_ready(self) -> None:
        """See EngineClient: always ready."""

    async def status(self) -> GangStatus:
        return GangStatus(True, "")

    def run(self) -> None:
        """Steps until closed."""
        while True:
            with self._changed:
                while not self._closing and not self._step():
                    self._changed.wait()
                if self._closing:
                    return

    def _step(self) -> bool:
        """Whether there was anything to do."""
        plan = self._engine.plan()
        events = [] if plan is None else self._engine.run(plan, self._dispatcher)
        events += self._engine.take_events()
        for event in events:
            if (stream := self._streams.get(event.request_id)) is not None:
                loop, queue = stream
                loop.call_soon_threadsafe(queue.put_nowait, event)
        return plan is not None

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify()


@contextmanager
def local_client(
    model_dir: Path,
    *,
    max_model_len: int = 2048,
    max_seqs: int = 16,
    max_draft_tokens: int = 0,
    adaptive_drafts: bool = True,
) -> Iterator[LocalClient]:
    """A checkpoint served by an engine of this process, in fp32 on one thread."""
    spec = GangSpec(
        name="local-test",
        model_dir=str(model_dir),
        dtype="float32",
        device="cpu",
        threads=1,
        kernels="auto",
        deterministic=False,
        shape=GangShape(1, 0),
        max_model_len=max_model_len,
        kv_memory=2**26,
        page_size=16,
        max_seqs=max_seqs,
        max_step_tokens=512,
        step_deadline_s=30.0,
        max_draft_tokens=max_draft_tokens,
        adaptive_drafts=adaptive_drafts,
    )
    changed = threading.Condition()

    def wake() -> None:
        with changed:
            changed.notify()

    engine, experts = build_engine(spec, served_config(spec), wake=wake)
    assert experts is not None
    client = LocalClient(engine, LocalEnd(experts), changed)
    thread = threading.Thread(target=client.run, name="engine")
    thread.start()
    try:
        yield client
    finally:
        client.close()
        thread.join()
