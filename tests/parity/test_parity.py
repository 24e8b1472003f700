"""The engine against transformers, fp32: log-probabilities of prompts, and greedy continuations token by token."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from divisi.cluster.request import Request, Sampling
from tests.parity.engines import local_engine
from tests.parity.oracle import Excuses, Oracle
from tests.parity.variants import ALL, make_variant

PREEMPTED_COUNT = 64
CHUNKS = [pytest.param(1, marks=pytest.mark.verify), 7, pytest.param(64, marks=pytest.mark.verify), 512]
PROMPT_LENGTHS = [1, 2, 5, 17, 64, 65, 90, 130]


@pytest.fixture(scope="module", params=ALL)
def variant(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Oracle]:
    name: str = request.param
    path = tmp_path_factory.mktemp(name)
    return name, path, Oracle(make_variant(name, path))


@pytest.fixture(scope="module")
def count(full_tier: bool) -> int:
    """Greedy tokens to compare."""
    return 64 if full_tier else 24


def make_prompt(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(1000 * seed + length)
    return [rng.randrange(211) for _ in range(length)]


@pytest.mark.parametrize(
    "chunk", [pytest.param(1, marks=pytest.mark.verify), 7, pytest.param(64, marks=pytest.mark.verify), 512]
)
def test_prompt_and_continuation(variant: tuple[str, Path, Oracle], chunk: int, count: int, excuses: Excuses) -> None:
    name, path, oracle = variant
    prompt = make_prompt(130)
    local = local_engine(path, max_seqs=1, max_step_tokens=chunk)
    request = Request("r", tuple(prompt), count, Sampling(temperature=0.0), logprobs=0, prompt_logprobs=0)
    events = local.run([request])["r"]
    told = next(event.prompt_logprobs for event in events if event.prompt_logprobs is not None)
    expected = oracle.logprobs(prompt)
    actual = torch.tensor([entry.logprob for entry in told[1:] if entry is not None])
    torch.testing.assert_close(actual, expected[torch.arange(129), torch.tensor(prompt[1:])], atol=1e-3, rtol=0)
    tokens = [token for event in events for token in event.token_ids]
    excuses.expect_same(oracle, prompt, oracle.greedy(prompt, count), tokens, f"{name}, chunk {chunk}")


def test_batch_of_16_at_mixed_positions(variant: tuple[str, Path, Oracle], count: int, excuses: Excuses) -> None:
    name, path, oracle = variant
    prompts = [make_prompt(length, seed) for seed in range(2) for length in PROMPT_LENGTHS]
    local = local_engine(path, max_step_tokens=33)
    answers = local.greedy(prompts, count)
    for prompt, answer in zip(prompts, answers, strict=True):
        expected = oracle.greedy(prompt, count)
        excuses.expect_same(oracle, prompt, expected, answer, f"{name}, batch of 16, prompt of {len(prompt)}")


def test_preempted_and_recomputed(variant: tuple[str, Path, Oracle], excuses: Excuses) -> None:
    name, path, oracle = variant
    prompts = [make_prompt(length, 3) for length in (40, 44, 36, 48)]
    local = local_engine(path, num_pages=36, max_seqs=4)  # all four together want 4 x 13 pages at their ends
    answers = local.greedy(prompts, PREEMPTED_COUNT)
    assert local.engine.stats().preemptions > 0
    for prompt, answer in zip(prompts, answers, strict=True):
        excuses.expect_same(oracle, prompt, oracle.greedy(prompt, PREEMPTED_COUNT), answer, f"{name}, preempted")


def test_plain_torch_kernels_agree_too(variant: tuple[str, Path, Oracle], excuses: Excuses) -> None:
    name, path, oracle = variant
    prompts = [make_prompt(70), make_prompt(5)]
    answers = local_engine(path, implementation="reference", max_step_tokens=40).greedy(prompts, 16)
    for prompt, answer in zip(prompts, answers, strict=True):
        excuses.expect_same(oracle, prompt, oracle.greedy(prompt, 16), answer, f"{name}, reference kernels")
