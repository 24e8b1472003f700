"""Gangs of every shape against transformers, fp32: real loops, control meshes and gloo groups, ranks in threads."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from divisi.cluster.request import Request, Sampling
from tests.parity.oracle import Excuses, Oracle
from tests.parity.variants import ALL, make_variant
from tests.support.thread_gang import small_spec, thread_gang

SHAPES = [(1, 0), (1, 1), (1, 2), (2, 2), (1, 3)]
QUICK = ("base", "seven-experts")
VARIANTS = [pytest.param(name, marks=() if name in QUICK else pytest.mark.verify) for name in ALL]


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Oracle]:
    path = tmp_path_factory.mktemp(request.param)
    return request.param, path, Oracle(make_variant(request.param, path))


@pytest.mark.parametrize(("workers", "shards"), SHAPES)
def test_greedy_tokens(variant: tuple[str, Path, Oracle], workers: int, shards: int, full_tier: bool) -> None:
    name, path, oracle = variant
    rng, excuses = random.Random(5), Excuses()
    lengths, count = ((1, 9, 30, 64, 65, 100), 64) if full_tier else ((2, 40, 65), 24)
    prompts = [[rng.randrange(211) for _ in range(length)] for length in lengths]
    with thread_gang(small_spec(path, workers, shards, max_step_tokens=48 * workers)) as gang:
        for index, prompt in enumerate(prompts):
            request = Request(str(index), tuple(prompt), count, Sampling(temperature=0.0))
            gang[index % workers].submit(request)
        for index, prompt in enumerate(prompts):
            answer = gang[index % workers].finish(str(index))
            excuses.expect_same(oracle, prompt, oracle.greedy(prompt, count), answer, f"{name} on {workers}A+{shards}E")
    excuses.expect_few()
