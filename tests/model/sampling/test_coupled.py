"""A draft stands if and only if it is the model's token under the same noise: exactly the model's distribution."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from divisi.cluster.request import Request, Sampling
from divisi.kernels.sampling.noise import gumbel_noise, row_keys
from divisi.model.sampling.logit_rules import SequenceRules
from divisi.model.sampling.sampler import NO_TOKEN, Sampler, SamplingBatch, SequenceSampling
from divisi.model.sampling.token_counts import History
from tests.support.sampling_oracle import ruled_logits

VOCAB, DRAWS, POSITION = 32, 20_000, 7


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """How likely counts are to be at least as far from what is expected; by the Wilson-Hilferty approximation."""
    expected = probabilities * counts.sum()
    statistic = float(((counts - expected) ** 2 / expected).sum())
    freedom = len(counts) - 1
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / (2 / (9 * freedom)) ** 0.5
    return float(0.5 * torch.erfc(torch.tensor(z / 2**0.5)))


def logits() -> tuple[torch.Tensor, torch.Tensor]:
    """Of the model, and of a drafter that is not far from it."""
    generator = torch.Generator().manual_seed(5)
    target_V = torch.randn(VOCAB, generator=generator)
    return target_V, target_V + 1.2 * torch.randn(VOCAB, generator=generator)


def choices(logits_V: torch.Tensor) -> np.ndarray:
    """The token of each of many seeds."""
    rows = [SequenceSampling(1.0, 0, 1.0, seed) for seed in range(DRAWS)]
    found = Sampler().sample(logits_V.expand(DRAWS, -1), SamplingBatch(rows), np.full(DRAWS, POSITION))
    return found.token_ids_R.numpy()


def test_ours_has_the_model_s_distribution() -> None:
    target_V, draft_V = logits()
    target, draft = choices(target_V), choices(draft_V)
    said = np.where(draft == target, draft, target)  # what stands, or the model's own in its place
    p = torch.softmax(target_V.double(), 0).numpy()
    assert chi_square(np.bincount(said, minlength=VOCAB), p) > 0.01
    accepted = float((draft == target).mean())
    distance = 0.5 * float(np.abs(p - torch.softmax(draft_V.double(), 0).numpy()).sum())
    assert accepted >= (1 - distance) / (1 + distance) - 0.01, "the bound of Daliri et al. 2024"


def test_the_usual_test_under_shared_noise_has_not() -> None:
    """Accepting with p/q, else drawing from the rest, is exact for independent draws only."""
    target_V, draft_V = logits()
    p, q = (torch.softmax(x.double(), 0).numpy() for x in (target_V, draft_V))
    draft = choices(draft_V)
    uniform = np.random.default_rng(3).random(DRAWS)
    accepted = uniform < np.minimum(1.0, p[draft] / q[draft])
    rest = np.maximum(p - q, 0.0)
    keys = torch.from_numpy(row_keys(np.arange(DRAWS, dtype=np.uint64), np.full(DRAWS, POSITION)))
    noise = gumbel_noise(keys, torch.arange(VOCAB, dtype=torch.int32))
    again = (noise + torch.from_numpy(np.log(rest + 1e-300)).float()).argmax(-1).numpy()
    said = np.where(accepted, draft, again)
    assert chi_square(np.bincount(said, minlength=VOCAB), p) < 1e-6


@pytest.mark.parametrize("seed", range(6))
def test_rules_see_what_is_drafted_as_history(seed: int) -> None:
    """Rows with drafts before them get the logits that they would get were these committed."""
    rng = np.random.default_rng(seed)
    rules = SequenceRules(
        bad_words=((3,), (4, 5), (6, 7, 8), (1, 1)),
        logit_bias=((2, 1.5),),
        repetition_penalty=1.3,
        presence_penalty=0.4,
        frequency_penalty=0.7,
    )
    sampling = Sampling(
        temperature=0.0,
        bad_words=rules.bad_words,
        logit_bias=rules.logit_bias,
        repetition_penalty=1.3,
        presence_penalty=0.4,
        frequency_penalty=0.7,
    )
    histories = [rng.integers(0, 9, size=size).tolist() for size in (4, 9)]
    sequences = [
        SequenceSampling(0.0, 0, 1.0, 0, rules=rules, history=History(name, tokens, 2))
        for name, tokens in zip("ab", histories, strict=True)
    ]
    owners, ahead = [0, 0, 0, 1, 1], [[], [4], [6, 7], [], [1]]
    batch = SamplingBatch(sequences, owners=owners)
    logits_RV = torch.from_numpy(rng.normal(size=(5, 9)).astype(np.float32))
    ahead_RA = torch.tensor([row + [NO_TOKEN] * (2 - len(row)) for row in ahead])
    positions = np.array([len(histories[owner]) + len(row) for owner, row in zip(owners, ahead, strict=True)])
    for _ in range(2):
        found = Sampler().sample(logits_RV, batch, positions, None, ahead_RA).token_ids_R.tolist()
        for row, token in enumerate(found):
            tokens = [*histories[owners[row]], *ahead[row]]
            expected = ruled_logits(logits_RV[row].numpy(), Request("r", tuple(tokens[:2]), 9, sampling), tokens)
            assert token == int(expected.argmax())
        batch.add(torch.tensor([6, NO_TOKEN]))  # of one of the two, a token is committed
        histories[0].append(6)
