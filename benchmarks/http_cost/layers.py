"""Where the time goes: the ingress one layer at a time, all in one process, each layer with those under it."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

import uvicorn

from divisi.benchmarks.http_cost.capture import body, scope_of
from divisi.benchmarks.http_cost.servers import MODEL, Setup, divisi_app
from divisi.cluster.request import Request, Sampling
from divisi.deploy.api.body.protocol import ChatBody
from divisi.deploy.api.compile.call import Call
from divisi.deploy.api.metrics import Metrics, RequestClock
from divisi.deploy.api.reply.answer import Delta, answer_deltas
from divisi.deploy.api.reply.chat import ChatWriter
from divisi.deploy.api.reply.streaming import GenerationResponse, Pace, Writer
from divisi.deploy.limits import Gate, GateLimits
from divisi.model.text import TextCodec

Stream = Callable[[str], Awaitable[None]]


class _Silent:
    """A writer that spells nothing."""

    def opening(self) -> bytes:
        return b""

    def chunk(self, index: int, delta: Delta) -> bytes:
        return b""

    def closing(self) -> bytes:
        return b""

    def whole(self, answers: Sequence[Delta]) -> bytes:
        return b""


def layers(setup: Setup) -> dict[str, Stream]:
    """Each serves one stream, whose name it is given. The names say what a layer adds to the one before."""
    tokenizer, engine = TextCodec.load(setup.model_dir).tokenizer, setup.engine()
    asked, metrics, app = body(len(setup.token_ids)), Metrics(), divisi_app(setup)
    content = json.dumps(asked).encode()

    def call(name: str) -> Call:
        return Call(Request(name, (0,), len(setup.token_ids), Sampling()))

    async def take(name: str) -> None:
        async for _ in engine.generate(call(name).request):
            pass

    async def detokenise(name: str) -> None:
        async for _ in answer_deltas(engine, call(name), tokenizer):
            pass

    async def reply(writer: Writer, made: Call) -> None:
        clock, gate = RequestClock(metrics, "chat"), Gate(GateLimits())
        response = GenerationResponse(engine, tokenizer, [made], writer, clock, gate, stream=Pace(2.0, 10.0))
        scope, receive = scope_of(content)
        await receive()
        await response(scope, receive, _ignore)

    async def loop(name: str) -> None:
        await reply(_Silent(), call(name))

    async def serialise(name: str) -> None:
        made = call(name)
        await reply(ChatWriter(ChatBody.model_validate(asked), [made], MODEL, tokenizer, "none"), made)

    async def application(name: str) -> None:
        await app(*scope_of(content), _ignore)

    return {
        "engine client: events of a step to each stream": take,
        "detokenise, stop rules": detokenise,
        "merge of choices, clock, limits, watch for the client's leaving": loop,
        "serialise to SSE": serialise,
        "per request: body, template, routing; per event: middleware around send": application,
    }


def measure_layers(setup: Setup, streams: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of processor time per token, cumulative, one entry per round; the first round is a warm-up."""
    served = layers(setup)
    found: dict[str, list[float]] = {name: [] for name in served}
    # the kind of event loop that the server has
    with asyncio.Runner(loop_factory=uvicorn.Config("").get_loop_factory()) as runner:
        for turn in range(rounds + 1):
            for name, stream in served.items():
                seconds = runner.run(_timed(stream, streams))
                if turn:
                    found[name].append(seconds / (streams * len(setup.token_ids)))
    return found


def layer_table(found: dict[str, list[float]], under_uvicorn: Sequence[float]) -> str:
    """What each layer adds, from medians; `under_uvicorn` is seconds per token of the whole server."""
    lines = ["| layer | us per token | with those above |", "|---|---|---|"]
    cumulative = {name: statistics.median(times) * 1e6 for name, times in found.items()}
    cumulative["uvicorn: ASGI send, HTTP framing, socket"] = statistics.median(under_uvicorn) * 1e6
    before = 0.0
    for name, total in cumulative.items():
        lines.append(f"| {name} | {total - before:.1f} | {total:.1f} |")
        before = total
    return "\n".join(lines)


async def _timed(stream: Stream, streams: int) -> float:
    started = time.process_time()
    await asyncio.gather(*(stream(str(number)) for number in range(streams)))
    return time.process_time() - started


async def _ignore(message: MutableMapping[str, Any]) -> None:
    pass
