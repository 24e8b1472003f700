"""The servers that are compared, each under uvicorn in a process of its own, pinned to a core."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import socket
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import uvicorn
from fastapi import FastAPI
from starlette.responses import StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from divisi.benchmarks.http_cost.engine import NoopEngine
from divisi.cluster.request import Request, Sampling
from divisi.deploy.api import ApiSettings, build_app
from divisi.model.text import TextCodec

MODEL = "noop"
PATH = "/v1/chat/completions"
_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]


@dataclass(frozen=True)
class Setup:
    """What every server of a run sends."""

    model_dir: Path
    token_ids: tuple[int, ...]
    events: tuple[bytes, ...] = ()
    """For the servers that send made bytes: Divisi's own events, one per event of the engine."""
    per_event: int = 1
    step_s: float = 0.0

    def engine(self) -> NoopEngine:
        """The source of tokens, the same for all."""
        return NoopEngine(self.token_ids, self.per_event, self.step_s)


def divisi_app(setup: Setup) -> ASGIApp:
    """The ingress."""
    codec = TextCodec.load(setup.model_dir)
    return build_app(setup.engine(), codec, ApiSettings(served_model_name=MODEL, max_model_len=2**16))


def fastapi_app(setup: Setup) -> ASGIApp:
    """A bare FastAPI route: the body as a dict, made bytes in a StreamingResponse."""
    app, engine = FastAPI(), setup.engine()

    @app.post(PATH)
    async def chat(body: dict[str, Any]) -> StreamingResponse:
        return StreamingResponse(_made(engine, setup.events), media_type="text/event-stream")

    return app


def fastapi_loop_app(setup: Setup) -> ASGIApp:
    """The same without an engine: a generator that yields and lets the others run."""
    app = FastAPI()

    async def loop() -> AsyncGenerator[bytes, None]:
        for events in setup.events:
            yield events
            await asyncio.sleep(0)

    @app.post(PATH)
    async def chat(body: dict[str, Any]) -> StreamingResponse:
        return StreamingResponse(loop(), media_type="text/event-stream")

    return app


def raw_app(setup: Setup) -> ASGIApp:
    """No framework: the floor of what an ASGI application costs under this server."""
    engine = setup.engine()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        async for events in _made(engine, setup.events):
            await send({"type": "http.response.body", "body": events, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    return app


def blast_app(setup: Setup) -> ASGIApp:
    """The whole answer in one piece: what the load generator can take in."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        await send({"type": "http.response.body", "body": b"".join(setup.events)})

    return app


APPS = {
    "blast": blast_app,
    "raw": raw_app,
    "fastapi loop": fastapi_loop_app,
    "fastapi": fastapi_app,
    "divisi": divisi_app,
}


async def _made(engine: NoopEngine, events: Sequence[bytes]) -> AsyncGenerator[bytes, None]:
    request = Request(os.urandom(8).hex(), (0,), len(events), Sampling())
    at = 0
    async for arrived in engine.generate(request):
        yield b"".join(events[at : at + len(arrived)])
        at += len(arrived)
    if at < len(events):
        yield b"".join(events[at:])


@dataclass(frozen=True)
class RunningServer:
    """A server process."""

    port: int
    process: psutil.Process

    def cpu_seconds(self) -> float:
        """What it has used so far, in user and system mode."""
        times = self.process.cpu_times()
        return float(times.user + times.system)


@contextmanager
def running(app: str, setup: Setup, core: int | None) -> Iterator[RunningServer]:
    """Start one of APPS and stop it in the end."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(app, setup, core, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        yield RunningServer(ours.recv(), psutil.Process(process.pid))
    finally:
        process.terminate()
        process.join()


def _serve(app: str, setup: Setup, core: int | None, pipe: Connection) -> None:
    if core is not None:
        os.sched_setaffinity(0, {core})
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    # As under Ray Serve: its uvicorn has no access log and no lifespan either.
    config = uvicorn.Config(APPS[app](setup), log_level="warning", access_log=False, lifespan="off")
    server = uvicorn.Server(config)
    gc.freeze()
    pipe.send(listener.getsockname()[1])
    server.run(sockets=[listener])
