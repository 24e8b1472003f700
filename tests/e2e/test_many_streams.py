"""64 clients at once, some of whom hang up: finished answers are their solo answers, and nothing is held afterwards."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import torch
from transformers import Qwen3NextForCausalLM

from tests.parity.oracle import Excuses, Oracle

from .conftest import Cluster
from .test_serve_split import metric, wait_for

pytestmark = pytest.mark.timeout(300)

STREAMS = 64
SEED = 20
HELD = ("kv_pages_free", "state_slots_free", "requests_running", "requests_waiting")


@dataclass
class Stream:
    """One client; it hangs up after `patience` chunks, if that is not None."""

    prompt: list[int]
    count: int
    patience: int | None

    async def read(self, http: httpx.AsyncClient) -> list[int] | None:
        """The tokens of the whole answer; None if it was given up."""
        body = {
            "model": "small", "prompt": self.prompt, "max_tokens": self.count, "temperature": 0, "stream": True,
            "ignore_eos": True, "return_token_ids": True,
        }  # fmt: skip
        tokens: list[int] = []
        chunks = 0
        async with http.stream("POST", "/v1/completions", json=body) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                if self.patience is not None and chunks >= self.patience:
                    return None
                if line.startswith("data: {"):
                    chunks += 1
                    for choice in json.loads(line[6:])["choices"]:
                        tokens += choice.get("token_ids") or []
        return tokens


def make_streams() -> list[Stream]:
    rng = random.Random(SEED)
    streams = []
    for _ in range(STREAMS):
        prompt = [rng.randrange(10, 1000) for _ in range(rng.choice((1, 3, 20, 70, 150)))]
        patience = rng.choice((None, None, 0, 2, 9))
        streams.append(Stream(prompt, rng.randint(1, 40), patience))
    return streams


def held(cluster: Cluster) -> list[list[float]]:
    return [metric(cluster, name) for name in HELD]


async def read_all(url: str, streams: list[Stream], at_once: int) -> list[list[int] | None]:
    gate = asyncio.Semaphore(at_once)
    limits = httpx.Limits(max_connections=None)

    async def one(stream: Stream) -> list[int] | None:
        async with gate:
            return await stream.read(http)

    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as http:
        return await asyncio.gather(*map(one, streams))


def test_64_streams(
    cluster: Cluster, small_model: Path, excuses: Excuses, record_result: Callable[[str, object], None]
) -> None:
    wait_for(lambda: metric(cluster, "requests_running") == [0.0], 10, "something still runs")
    before = held(cluster)
    assert all(before), f"a metric of {HELD} is missing: {before}"
    streams = make_streams()
    answers = asyncio.run(read_all(cluster.url, streams, STREAMS))
    wait_for(lambda: held(cluster) == before, 20, f"held afterwards: {held(cluster)}, before: {before}, seed {SEED}")

    finished = [(stream, tokens) for stream, tokens in zip(streams, answers, strict=True) if tokens is not None]
    assert len(finished) > STREAMS / 3
    solo = asyncio.run(read_all(cluster.url, [Stream(stream.prompt, stream.count, None) for stream, _ in finished], 1))
    oracle = Oracle(Qwen3NextForCausalLM.from_pretrained(small_model, dtype=torch.float32).eval())
    for (stream, tokens), alone in zip(finished, solo, strict=True):
        assert alone is not None
        assert len(tokens) == stream.count
        excuses.expect_same(oracle, stream.prompt, alone, tokens, f"prompt of {len(stream.prompt)}, seed {SEED}")
    record_result("answers finished and equal to their solo runs", f"{len(finished)} of {STREAMS} streams")
