"""One forward pass over runs of both kinds: each row's logits are those of its sequence alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from divisi.kernels.select import select_kernels
from divisi.model.random_checkpoint import SMALL_CONFIG, write_random_checkpoint
from tests.support.model_steps import CPU, ModelSteps

CONFIG = SMALL_CONFIG | {"vocab_size": 211, "num_hidden_layers": 4, "full_attention_interval": 2}
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runner")
    write_random_checkpoint(path, CONFIG, tokenizer=False)
    return path


def texts(*lengths: int) -> list[list[int]]:
    rng = random.Random(len(lengths))
    return [[rng.randrange(CONFIG["vocab_size"]) for _ in range(length)] for length in lengths]


def chunks(tokens: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(tokens), size):
        yield tokens[start : start + size]


def alone(model: ModelSteps, tokens: list[list[int]]) -> list[Tensor]:
    """Logits of every position of each sequence, from one scan of it alone."""
    found = [model.step({}, {index: text})[index] for index, text in enumerate(tokens)]
    model.forget()
    return found


@pytest.mark.parametrize("implementation", ["reference", "native"])
def test_one_row_scans_beside_ring_runs(checkpoint: Path, implementation: str) -> None:
    """Chunks of one row scan beside ring runs of 1, 2 and 6 rows, of which the last may be rejected."""
    kernels = select_kernels(CPU, implementation)
    model = ModelSteps.load(checkpoint, kernels, torch.float32, sequences=4, most_tokens=48, max_rows=6)
    tokens = texts(40, 40, 40, 40)
    expected = alone(model, tokens)
    model.step({}, {index: tokens[index][:9] for index in range(3)})
    length = {0: 9, 1: 9, 2: 9, 3: 0}
    for rejected in ({1: 1, 2: 5}, {2: 2}, {}, {1: 1, 2: 1}):
        count = {0: 1, 1: 2, 2: 6, 3: 1}
        good = {index: count[index] - rejected.get(index, 0) for index in range(4)}
        step = {i: tokens[i][length[i] : length[i] + good[i]] + [5] * rejected.get(i, 0) for i in range(4)}
        logits = model.step({i: step[i] for i in range(3)}, {3: step[3]}, rejected=rejected)
        for index in range(4):
            rows = slice(length[index], length[index] + good[index])
            torch.testing.assert_close(logits[index][: good[index]], expected[index][rows], atol=1e-3, rtol=1e-3)
            length[index] += good[index]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("last_only", [False, True])
def test_deterministic_whatever_the_batch(checkpoint: Path, dtype: torch.dtype, last_only: bool) -> None:
    """A sequence's logits are bit-identical alone and among 2, 7, 32 and 64, prefilled and decoded."""
    kernels = select_kernels(CPU, deterministic=True)
    model = ModelSteps.load(checkpoint, kernels, dtype, sequences=64, most_tokens=32)
    tokens = texts(*(5 + 11 * index % 19 for index in range(64)))

    def run(indices: range) -> list[Tensor]:
        model.forget()
        first = model.step({}, {index: tokens[index][:-2] for index in indices}, last_only=last_only)
        more = [model.step({i: tokens[i][at : at + 1 or None] for i in indices}, {}) for at in (-2, -1)]
        return [torch.cat([part[index] for part in (first, *more)]) for index in indices]

    expected = [run(range(index, index + 1))[0] for index in range(64)]
    for count in (2, 7, 32, 64):
        for index, logits in enumerate(run(range(64 - count, 64)), start=64 - count):
            assert torch.equal(logits, expected[index]), f"sequence {index} among {count}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_deterministic_however_prompts_are_cut(checkpoint: Path, dtype: torch.dtype) -> None:
    """Prompts in chunks of any size, of their own and of those beside them, or decoded, or in ring runs: the same bits.

    So tokens that are computed again after a preemption, in a scan, give what they gave when they were decoded.
    """
    kernels = select_kernels(CPU, deterministic=True)
    model = ModelSteps.load(checkpoint, kernels, dtype, sequences=3, most_tokens=160, max_rows=6)
    tokens = texts(150, 61, 149)
    expected = alone(model, tokens)
    for sizes in ((1, 3, 150), (48, 7, 11), (47, 61, 2), (149, 13, 64)):
        model.forget()
        parts = [list(chunks(text, size)) for text, size in zip(tokens, sizes, strict=True)]
        found: list[list[Tensor]] = [[], [], []]
        for turn in range(max(map(len, parts))):
            own = {index: part[turn] for index, part in enumerate(parts) if turn < len(part)}
            rings = {i: own.pop(i) for i in list(own) if turn and len(own[i]) <= 6 and sizes[i] % 2}
            for index, logits in model.step(rings, own).items():
                found[index].append(logits)
        for index, logits in enumerate(expected):
            assert torch.equal(torch.cat(found[index]), logits), f"sequence {index} in chunks of {sizes}"
