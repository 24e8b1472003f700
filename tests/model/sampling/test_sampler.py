from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from divisi.model.sampling.sampler import Sampler, SamplingBatch, SequenceSampling, token_logprobs
from tests.support.sampling_oracle import assert_fits

GREEDY = SequenceSampling(temperature=0.0, top_k=0, top_p=1.0, seed=0)


def row(temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0, **more: int) -> SequenceSampling:
    return SequenceSampling(temperature, top_k, top_p, seed, **more)


def sample(logits_RV: Tensor, rows: list[SequenceSampling], positions: list[int]) -> list[int]:
    tokens: list[int] = Sampler().sample(logits_RV, SamplingBatch(rows), np.array(positions)).token_ids_R.tolist()
    return tokens


def exact_distribution(logits_V: Tensor, rule: SequenceSampling) -> np.ndarray:
    """The filtered distribution, one token after the other."""
    scaled = logits_V.double().numpy() / rule.temperature
    order = sorted(range(len(scaled)), key=lambda token: (-scaled[token], token))
    if rule.top_k:
        order = order[: rule.top_k]
    weights = {token: math.exp(scaled[token] - scaled[order[0]]) for token in order}
    total, reached, kept = sum(weights.values()), 0.0, []
    for token in order:
        kept.append(token)
        reached += weights[token]
        if reached >= rule.top_p * total:
            break
    probabilities = np.zeros(len(scaled))
    probabilities[kept] = [weights[token] for token in kept]
    return np.asarray(probabilities / probabilities.sum())


@pytest.mark.parametrize(
    "rule",
    [
        row(),
        row(temperature=0.6),
        row(temperature=1.7),
        row(top_k=1),
        row(top_k=7),
        row(top_k=49),
        row(top_k=1000),
        row(top_p=0.5),
        row(top_p=0.95, temperature=0.8),
        row(top_p=0.7, top_k=12, temperature=1.2),
        row(top_p=1e-9),
        row(top_p=0.999999),
    ],
    ids=str,
)
@pytest.mark.parametrize("vary", ["position", "seed"])
def test_distribution_is_exact(rule: SequenceSampling, vary: str) -> None:
    count, vocab = 20_000, 50
    logits_V = torch.randn(vocab, generator=torch.Generator().manual_seed(1)) * 2
    seeds = range(count) if vary == "seed" else [17] * count
    positions = list(range(count)) if vary == "position" else [5] * count
    rows = [row(rule.temperature, rule.top_k, rule.top_p, seed) for seed in seeds]
    tokens = sample(logits_V.expand(count, vocab), rows, positions)
    counts = np.bincount(tokens, minlength=vocab)
    assert_fits(counts, exact_distribution(logits_V, rule), "sampled")


@pytest.mark.parametrize(("seeds", "positions"), [((3, 3), (0, 1)), ((3, 4), (0, 0)), ((0, 2**32), (0, 0))])
def test_neighbouring_positions_and_seeds_are_independent(seeds: tuple[int, int], positions: tuple[int, int]) -> None:
    count, vocab = 30_000, 6
    pair = []
    for seed, position in zip(seeds, positions, strict=True):
        rows = [row(seed=seed + 5 * index) for index in range(count)]
        pair.append(sample(torch.zeros(count, vocab), rows, [position + 2 * index for index in range(count)]))
    joint = np.bincount(np.array(pair[0]) * vocab + np.array(pair[1]), minlength=vocab * vocab)
    assert_fits(joint, np.full(vocab * vocab, 1 / vocab**2), "sampled")


def _mixed_rows(count: int, seed: int) -> list[SequenceSampling]:
    random = np.random.default_rng(seed)
    kinds = [
        GREEDY,
        row(),
        row(temperature=0.4),
        row(top_p=0.9),
        row(top_p=0.9999, temperature=2.5),
        row(top_k=5),
        row(top_k=1500, top_p=0.97),
        row(top_k=40, top_p=0.6, temperature=1.4),
    ]
    rows = []
    for index in range(count):
        kind = kinds[index % len(kinds)]
        rows.append(row(kind.temperature, kind.top_k, kind.top_p, int(random.integers(2**63)), logprobs=index % 3))
    return rows


@pytest.mark.parametrize("vocab", [1, 2, 1023, 1024, 1025, 40_009])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_alone_equals_the_row_among_others(vocab: int, threads: int) -> None:
    count = 24
    logits_RV = torch.randn(count, vocab, generator=torch.Generator().manual_seed(vocab)) * 2
    rows, positions = _mixed_rows(count, vocab), list(range(100, 100 + count))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = Sampler().sample(logits_RV, SamplingBatch(rows), np.array(positions))
        assert together.logprobs is not None
        for index in range(count):
            one = SamplingBatch([rows[index]])
            alone = Sampler().sample(logits_RV[index : index + 1], one, np.array(positions[index : index + 1]))
            assert alone.logprobs is not None
            assert alone.token_ids_R[0] == together.token_ids_R[index]
            assert torch.equal(alone.logprobs.chosen_L[0], together.logprobs.chosen_L[index])
            width = alone.logprobs.top_LN.shape[1]
            assert torch.equal(alone.logprobs.top_LN[0], together.logprobs.top_LN[index, :width])
    finally:
        torch.set_num_threads(before)


def test_filters_that_keep_everything_change_nothing() -> None:
    count, vocab = 200, 3000
    logits_RV = torch.randn(count, vocab, generator=torch.Generator().manual_seed(2))
    positions = list(range(count))
    plain = sample(logits_RV, [row(seed=9)] * count, positions)
    assert sample(logits_RV, [row(seed=9, top_k=vocab)] * count, positions) == plain
    assert sample(logits_RV, [row(seed=9, top_k=10**9)] * count, positions) == plain
    assert sample(logits_RV, [row(seed=9, top_p=1 - 1e-12)] * count, positions) == plain


@pytest.mark.parametrize(
    "rule",
    [GREEDY, row(top_k=1), row(top_p=1e-12), row(top_p=0.0), row(temperature=1e-30), row(temperature=1e-60), row(1e-6)],
    ids=str,
)
def test_edges_that_leave_one_token_choose_the_best(rule: SequenceSampling) -> None:
    logits_RV = torch.randn(50, 5000, generator=torch.Generator().manual_seed(3)) * 5
    assert sample(logits_RV, [rule] * 50, list(range(50))) == logits_RV.argmax(-1).tolist()


@pytest.mark.parametrize("rule", [GREEDY, row(top_k=1), row(top_p=1e-12)], ids=str)
def test_among_equals_the_lowest_id_wins(rule: SequenceSampling) -> None:
    logits_RV = torch.zeros(4, 5000)
    logits_RV[:, [4000, 77, 3000]] = torch.tensor([2.0, 2.0, 2.0])
    logits_RV[3] = -0.0
    logits_RV[3, 1:] = 0.0
    assert sample(logits_RV, [rule] * 4, [0, 1, 2, 3]) == [77, 77, 77, 0]


def test_top_k_cuts_equals_at_exactly_k_and_keeps_the_lowest_ids() -> None:
    count = 3000
    tokens = sample(torch.zeros(count, 2000), [row(top_k=3)] * count, list(range(count)))
    assert_fits(np.bincount(tokens, minlength=4), np.array([1 / 3, 1 / 3, 1 / 3, 0]), "sampled")


def test_a_flat_distribution_needs_more_than_the_first_candidates() -> None:
    count, vocab = 4000, 5000
    tokens = sample(torch.zeros(count, vocab), [row(top_p=0.6)] * count, list(range(count)))
    assert max(tokens) in range(2900, 3001)
    halves = np.bincount(np.array(tokens) // 1500, minlength=2)
    assert_fits(halves, np.array([0.5, 0.5]), "sampled")


def test_masked_tokens_are_never_chosen() -> None:
    logits_RV = torch.full((300, 100), -torch.inf)
    logits_RV[:, 42:44] = torch.tensor([0.0, 1.0])
    rows = [row(), row(top_p=0.99), row(top_k=5)] * 100
    assert set(sample(logits_RV, rows, list(range(300)))) == {42, 43}


def test_no_rows() -> None:
    result = Sampler().sample(torch.empty(0, 10), SamplingBatch([]), np.array([], dtype=np.int64))
    assert result.token_ids_R.shape == (0,)
    assert result.logprobs is None


def test_sampling_leaves_the_logits_as_they_are() -> None:
    logits_RV = torch.randn(8, 2000, generator=torch.Generator().manual_seed(4))
    before = logits_RV.clone()
    sample(logits_RV, _mixed_rows(8, 0), list(range(8)))
    assert torch.equal(logits_RV, before)


@pytest.mark.parametrize("vocab", [7, 151_936])
@pytest.mark.parametrize("num_top", [0, 1, 5, 20])
def test_logprobs_are_the_log_softmax_of_the_raw_logits(vocab: int, num_top: int) -> None:
    logits_LV = torch.randn(3, vocab, generator=torch.Generator().manual_seed(vocab)) * 4
    targets_L = torch.tensor([0, vocab // 2, vocab - 1])
    found = token_logprobs(logits_LV, targets_L, num_top)
    expected_LV = torch.log_softmax(logits_LV.double(), -1)
    best = expected_LV.topk(min(num_top, vocab), -1)
    torch.testing.assert_close(found.chosen_L.double(), expected_LV.gather(-1, targets_L[:, None])[:, 0])
    torch.testing.assert_close(found.top_LN.double(), best.values)
    assert torch.equal(found.top_ids_LN, best.indices)
