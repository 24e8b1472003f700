"""With deterministic kernels an answer and its log-probabilities are the same to the bit, whatever runs beside it."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from divisi.cluster.request import Request, Sampling, TokenEvent
from divisi.model.random_checkpoint import SMALL_CONFIG, write_random_checkpoint
from tests.parity.engines import LocalEngine, local_engine

PROMPT, ANSWER = 90, 24
verify = pytest.mark.verify


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    write_random_checkpoint(path, SMALL_CONFIG, seed=6, tokenizer=False)
    return path


def request(name: str, seed: int, prompt: int, answer: int) -> Request:
    rng = random.Random(seed)
    tokens = tuple(rng.randrange(SMALL_CONFIG["vocab_size"]) for _ in range(prompt))
    return Request(name, tokens, answer, Sampling(seed=seed), logprobs=20, prompt_logprobs=20)


WATCHED = request("watched", 1, PROMPT, ANSWER)


def others(count: int, seed: int) -> list[Request]:
    rng = random.Random(seed)
    return [request(str(i), seed + i, rng.randint(1, 120), rng.randint(1, 40)) for i in range(count)]


def told(events: list[TokenEvent]) -> tuple[object, ...]:
    """All that a request was told."""
    return (
        [token for event in events for token in event.token_ids],
        [entry for event in events for entry in event.logprobs or ()],
        [event.prompt_logprobs for event in events if event.prompt_logprobs is not None],
        events[-1].finish_reason,
    )


def engine(model_dir: Path, dtype: torch.dtype, **sizes: int) -> LocalEngine:
    return local_engine(model_dir, dtype=dtype, deterministic=True, **{"num_pages": 2000, "max_seqs": 64, **sizes})


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=verify)], ids=str)
@pytest.mark.parametrize("batch", [pytest.param(2, marks=verify), 7, pytest.param(32, marks=verify),
                                   pytest.param(64, marks=verify)])  # fmt: skip
@pytest.mark.parametrize("budget", [64, pytest.param(131, marks=verify), pytest.param(512, marks=verify)])
def test_beside_others_as_alone(model_dir: Path, dtype: torch.dtype, batch: int, budget: int) -> None:
    alone = told(engine(model_dir, dtype).run([WATCHED])["watched"])
    beside = others(batch - 1, seed=100 * batch + budget)
    place = len(beside) // 2
    events = engine(model_dir, dtype, max_step_tokens=budget).run([*beside[:place], WATCHED, *beside[place:]])
    assert told(events["watched"]) == alone


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=verify)], ids=str)
def test_computed_again_after_preemption_as_at_first(model_dir: Path, dtype: torch.dtype) -> None:
    alone = told(engine(model_dir, dtype).run([WATCHED])["watched"])
    # The pages hold a prompt and a half: the later of two gives way in the middle of its answer.
    tight = engine(model_dir, dtype, num_pages=24, max_seqs=64)
    events = tight.run([request("first", 2, 60, 60), WATCHED])
    assert tight.engine.stats().preemptions > 0
    assert told(events["watched"]) == alone
