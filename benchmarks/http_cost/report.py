"""Runs the servers one after the other, round after round, and prints the tables."""

from __future__ import annotations

import asyncio
import os
import random
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

from divisi.benchmarks.http_cost.capture import body, capture, check_answer
from divisi.benchmarks.http_cost.layers import layer_table, measure_layers
from divisi.benchmarks.http_cost.load import LoadGenerator
from divisi.benchmarks.http_cost.servers import PATH, RunningServer, Setup, divisi_app, running
from divisi.model.text import TextCodec, Tokenizer

STREAMS = 64
_PACE_S = 0.02


@dataclass
class Cell:
    """Measurements of one server, one entry per round."""

    name: str
    app: str
    setup: Setup
    per_core: list[float] = field(default_factory=list)
    """Tokens per second of the server's processor time."""
    per_second: list[float] = field(default_factory=list)
    """Tokens per second by the clock."""
    generator: list[float] = field(default_factory=list)
    """The load generator's share of its core."""


def report(model_dir: Path, rounds: int, tokens: int) -> str:
    """Both tables. Exits where an answer is wrong."""
    setup = make_setup(model_dir, tokens)
    by_four = with_events(replace(setup, per_event=4))
    paced = with_events(replace(setup, token_ids=setup.token_ids[: tokens // 4], step_s=_PACE_S))
    cells = [
        Cell("divisi ingress", "divisi", setup),
        Cell("bare FastAPI StreamingResponse, same source of tokens", "fastapi", setup),
        Cell("bare FastAPI StreamingResponse, a loop over bytes", "fastapi loop", setup),
        Cell("raw ASGI application, same source of tokens", "raw", setup),
        Cell(f"divisi ingress, a step every {_PACE_S * 1e3:.0f} ms", "divisi", paced),
        Cell(f"raw ASGI application, a step every {_PACE_S * 1e3:.0f} ms", "raw", paced),
        Cell("divisi ingress, 4 tokens per event", "divisi", by_four),
        Cell("bare FastAPI, 4 tokens per event", "fastapi", by_four),
        Cell("the whole answer in one piece: the load generator's limit", "blast", setup),
    ]
    measure(cells, rounds)
    under_uvicorn = [1 / speed for speed in cells[0].per_core]
    found = layer_table(measure_layers(setup, STREAMS, rounds), under_uvicorn)
    told = f"{STREAMS} streams of {tokens} tokens, {rounds} rounds, medians (lowest to highest); one process, one core"
    return f"{told}\n\n{table(cells)}\n\n{found}"


def make_setup(model_dir: Path, tokens: int) -> Setup:
    """Random tokens that are text each, and Divisi's events for them. Exits where Divisi's answer is wrong."""
    tokenizer = TextCodec.load(model_dir).tokenizer
    plain = [token for token in range(tokenizer.vocab_size) if _is_text(tokenizer, token)]
    setup = Setup(model_dir, tuple(random.Random(1).choices(plain, k=tokens)))
    return with_events(setup)


def with_events(setup: Setup) -> Setup:
    """The setup with Divisi's own events for it."""
    tokenizer = TextCodec.load(setup.model_dir).tokenizer

    async def events() -> list[bytes]:
        return await capture(divisi_app(setup), len(setup.token_ids))

    found = asyncio.run(events())
    check_answer(b"".join(found), setup.token_ids, tokenizer, "divisi")
    steps = -(-len(setup.token_ids) // setup.per_event)
    return replace(setup, events=(*found[: steps - 1], b"".join(found[steps - 1 :])))


def measure(cells: Sequence[Cell], rounds: int) -> None:
    """Fill the cells, taking turns; the first round is a warm-up. Exits where an answer is wrong."""
    cores = sorted(os.sched_getaffinity(0))
    server_core, load_core = (cores[0], cores[-1]) if len(cores) > 1 else (None, None)
    with ExitStack() as stack:
        load = stack.enter_context(LoadGenerator(load_core))
        servers = [stack.enter_context(running(cell.app, cell.setup, server_core)) for cell in cells]
        for turn in range(rounds + 1):
            for cell, server in zip(cells, servers, strict=True):
                _burst(cell, server, load, counts=turn > 0)


def _burst(cell: Cell, server: RunningServer, load: LoadGenerator, *, counts: bool) -> None:
    tokens = len(cell.setup.token_ids)
    before = server.cpu_seconds()
    taken = load.take(server.port, PATH, body(tokens), STREAMS)
    used = max(server.cpu_seconds() - before, 1 / os.sysconf("SC_CLK_TCK"))  # what the clock can tell from nothing
    tokenizer = TextCodec.load(cell.setup.model_dir).tokenizer
    check_answer(unchunked(taken.first), cell.setup.token_ids, tokenizer, cell.name)
    if not taken.same:
        raise SystemExit(f"{cell.name}: the streams differ in length")
    if counts:
        cell.per_core.append(STREAMS * tokens / used)
        cell.per_second.append(STREAMS * tokens / taken.seconds)
        cell.generator.append(taken.cpu_seconds / taken.seconds)


def table(cells: Sequence[Cell]) -> str:
    """Medians, with the lowest and highest round."""
    lines = [
        "| server | tokens/s per core | us of processor time per token | tokens/s by the clock | load generator |",
        "|---|---|---|---|---|",
    ]
    for cell in cells:
        cost = 1e6 / statistics.median(cell.per_core)
        share = statistics.median(cell.generator)
        lines.append(
            f"| {cell.name} | {_range(cell.per_core)} | {cost:.1f} | {_range(cell.per_second)} | {share:.0%} |"
        )
    return "\n".join(lines)


def _range(values: Sequence[float]) -> str:
    return f"{statistics.median(values):,.0f} ({min(values):,.0f} to {max(values):,.0f})"


def _is_text(tokenizer: Tokenizer, token: int) -> bool:
    raw = tokenizer.bytes_of(token)
    return token not in tokenizer.special_ids and raw.isascii() and raw.isalpha()


def unchunked(response: bytes) -> bytes:
    """The body of a response in chunks."""
    rest = response.partition(b"\r\n\r\n")[2]
    body = b""
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        length = int(size, 16)
        body, rest = body + rest[:length], rest[length + 2 :]
    return body
