"""Gangs of every shape against transformers, fp32: real loops, control meshes and gloo groups, ranks in threads."""

from __future__ import annotations

import random
from itertools import product, starmap
from pathlib import Path

import pytest

from divisi.cluster.request import Request, Sampling
from divisi.cluster.seats import GangShape
from tests.parity.oracle import Excuses, Oracle
from tests.parity.variants import ALL, make_variant
from tests.support.thread_gang import small_spec, thread_gang

QUICK_SHAPES = [*starmap(GangShape, ((1, 0), (1, 1), (1, 2), (2, 2), (1, 3)))]
QUICK_SHAPES += [GangShape(ranks, ranks, colocated=True) for ranks in (1, 2, 3)]
LARGER_SHAPES = [GangShape(4, 4, colocated=True)]
LARGER_SHAPES += [shape for shape in starmap(GangShape, product(range(1, 5), repeat=2)) if shape not in QUICK_SHAPES]
QUICK_VARIANTS = ("base", "seven-experts")
QUICK = [*product(QUICK_VARIANTS, QUICK_SHAPES)]
# What differs between the models is inside one rank: the larger gangs serve two of them.
VERIFY = [case for case in product(ALL, QUICK_SHAPES) if case not in QUICK] + [*product(QUICK_VARIANTS, LARGER_SHAPES)]


def name_of(value: str | GangShape) -> str:
    if isinstance(value, str):
        return value
    return f"colocated-{value.size}" if value.colocated else f"{value.attention_workers}A+{value.expert_shards}E"


@pytest.fixture(scope="module")
def variant(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Oracle]:
    path = tmp_path_factory.mktemp(request.param)
    return request.param, path, Oracle(make_variant(request.param, path))


@pytest.mark.parametrize(
    ("variant", "shape"),
    [*QUICK, *(pytest.param(*case, marks=pytest.mark.verify) for case in VERIFY)],
    ids=name_of,
    indirect=["variant"],
)
def test_greedy_tokens(variant: tuple[str, Path, Oracle], shape: GangShape, full_tier: bool, excuses: Excuses) -> None:
    name, path, oracle = variant
    workers = shape.attention_workers
    rng = random.Random(5)
    lengths, count = ((1, 9, 30, 64, 65, 100), 64) if full_tier else ((2, 40, 65), 24)
    prompts = [[rng.randrange(211) for _ in range(length)] for length in lengths]
    with thread_gang(small_spec(path, shape, max_step_tokens=48 * workers)) as gang:
        for index, prompt in enumerate(prompts):
            request = Request(str(index), tuple(prompt), count, Sampling(temperature=0.0))
            gang[index % workers].submit(request)
        for index, prompt in enumerate(prompts):
            answer = gang[index % workers].finish(str(index))
            excuses.expect_same(oracle, prompt, oracle.greedy(prompt, count), answer, f"{name} on {name_of(shape)}")
