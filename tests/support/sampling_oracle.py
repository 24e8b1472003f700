"""The rules and filters of sampling once more, one row and one token at a time in NumPy: what tests compare with."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from divisi.cluster.request import Request, Sampling


def ruled_logits(logits: NDArray[np.float32], request: Request, tokens: Sequence[int]) -> NDArray[np.float32]:
    """The logits [V] after everything that a request demands but its grammar; `tokens` are its prompt and answer."""
    sampling, answer = request.sampling, list(tokens[len(request.prompt) :])
    values = logits.astype(np.float32)
    if sampling.allowed_token_ids is not None:
        values[[token not in sampling.allowed_token_ids for token in range(len(values))]] = -np.inf
    for word in sampling.bad_words:
        start = len(answer) - len(word) + 1
        if start >= 0 and answer[start:] == list(word[:-1]):
            values[word[-1]] = -np.inf
    if len(answer) < request.min_tokens:
        values[list(request.stop_ids)] = -np.inf
    for token, bias in sampling.logit_bias:
        values[token] += np.float32(bias)
    for token in set(tokens):
        penalty = np.float32(sampling.repetition_penalty)
        values[token] *= np.float32(1) / penalty if values[token] > 0 else penalty
    for token in set(answer):
        values[token] -= np.float32(sampling.frequency_penalty) * np.float32(answer.count(token))
        values[token] -= np.float32(sampling.presence_penalty)
    return values


def distribution(logits: NDArray[np.float32], sampling: Sampling) -> NDArray[np.float64]:
    """The probabilities [V] that temperature, min-p, top-k and top-p leave of (ruled) logits."""
    order = sorted(range(len(logits)), key=lambda token: (-float(logits[token]), token))
    if sampling.temperature == 0:
        return np.eye(len(logits))[order[0]]
    best = float(logits[order[0]])
    weights = {token: math.exp((float(logits[token]) - best) / sampling.temperature) for token in order}
    order = [token for token in order if weights[token] >= sampling.min_p]
    order = order[: sampling.top_k or None]
    total, reached, kept = sum(weights[token] for token in order), 0.0, []
    for token in order:
        kept.append(token)
        reached += weights[token]
        if reached >= sampling.top_p * total:
            break
    probabilities = np.zeros(len(logits))
    probabilities[kept] = [weights[token] for token in kept]
    return np.asarray(probabilities / probabilities.sum())


def assert_fits(counts: NDArray[np.int64], probabilities: NDArray[np.float64], what: str) -> None:
    """Chi-square at five sigma; rare tokens are pooled, impossible ones must be missing."""
    assert counts[probabilities == 0].sum() == 0, what
    expected = probabilities * counts.sum()
    rare = expected < 10
    observed = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    used = expected > 0
    statistic = float((((observed - expected) ** 2)[used] / expected[used]).sum())
    freedom = max(int(used.sum()) - 1, 1)
    assert statistic < freedom + 5 * math.sqrt(2 * freedom) + 10, what
