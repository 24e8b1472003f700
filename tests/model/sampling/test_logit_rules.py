from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from divisi.cluster.request import Request, Sampling
from divisi.model.sampling.logit_rules import RuleBatch, SequenceRules
from divisi.model.sampling.sampler import NO_TOKEN, Sampler, SamplingBatch, SequenceSampling
from divisi.model.sampling.token_counts import History, TokenCounts
from tests.support.sampling_oracle import assert_fits, distribution, ruled_logits

VOCAB = 40
CPU = torch.device("cpu")
TOKENS = (3, 5, 5, 9, 30, 7, 3, 7, 7, 11)
PROMPT = 4
"""TOKENS: a prompt of four, then the answer so far."""

CASES = {
    "greedy": (Sampling(temperature=0.0), {}),
    "plain": (Sampling(), {}),
    "min_p": (Sampling(min_p=0.07), {}),
    "min_p of one": (Sampling(min_p=1.0), {}),
    "min_p, top_k and top_p": (Sampling(temperature=1.6, min_p=0.05, top_k=9, top_p=0.8), {}),
    "top_p tiny": (Sampling(top_p=1e-9), {}),
    "top_k of one": (Sampling(top_k=1), {}),
    "repetition": (Sampling(repetition_penalty=1.8), {}),
    "repetition below one": (Sampling(repetition_penalty=0.6, temperature=0.8), {}),
    "greedy repetition": (Sampling(temperature=0.0, repetition_penalty=5.0), {}),
    "presence": (Sampling(presence_penalty=1.5), {}),
    "presence below zero": (Sampling(presence_penalty=-1.0), {}),
    "frequency": (Sampling(frequency_penalty=0.9), {}),
    "all penalties": (Sampling(repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.3, top_p=0.9), {}),
    "bias": (Sampling(logit_bias=((0, 2.0), (7, -1.5), (39, 3.0))), {}),
    "bias of a hundred": (Sampling(logit_bias=((17, 100.0), (18, -100.0))), {}),
    "greedy bias": (Sampling(temperature=0.0, logit_bias=((21, 50.0),)), {}),
    "allowed": (Sampling(allowed_token_ids=(1, 2, 30)), {}),
    "one allowed": (Sampling(temperature=0.0, allowed_token_ids=(33,)), {}),
    "bad words": (Sampling(bad_words=((0,), (11, 2), (7, 11, 4), (8, 11, 6), (7, 11, 2), (3, 5))), {}),
    "long bad word": (Sampling(bad_words=((9, 30, 7, 3, 7, 7, 11, 1), (30, 7, 3, 7, 7, 11, 2)), temperature=2.0), {}),
    "early stops": (Sampling(temperature=1.2), {"stop_ids": frozenset({1, 8, 22}), "min_tokens": 7}),
    "stops in time": (Sampling(temperature=1.2), {"stop_ids": frozenset({1, 8, 22}), "min_tokens": 6}),
    "everything": (
        Sampling(
            temperature=0.9,
            min_p=0.01,
            top_k=20,
            top_p=0.97,
            repetition_penalty=1.2,
            presence_penalty=0.2,
            frequency_penalty=-0.1,
            logit_bias=((5, 1.0), (6, -1.0)),
            allowed_token_ids=tuple(range(1, 35)),
            bad_words=((2,), (11, 3)),
        ),
        {"stop_ids": frozenset({4, 12}), "min_tokens": 100},
    ),
}


def request(name: str) -> Request:
    sampling, more = CASES[name]
    return Request(name, TOKENS[:PROMPT], 100, sampling, **more)


def row_sampling(asked: Request, seed: int, history: History) -> SequenceSampling:
    sampling = asked.sampling
    rules = SequenceRules(
        allowed_token_ids=sampling.allowed_token_ids,
        bad_words=sampling.bad_words,
        stop_ids=tuple(asked.stop_ids),
        min_position=history.prompt + asked.min_tokens,
        logit_bias=sampling.logit_bias,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
    )
    return SequenceSampling(
        sampling.temperature,
        sampling.top_k,
        sampling.top_p,
        seed,
        min_p=sampling.min_p,
        rules=None if rules == SequenceRules(min_position=history.prompt) else rules,
        history=history,
    )


def some_logits(seed: int) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).normal(size=VOCAB) * 2).astype(np.float32)


def test_each_request_of_one_batch_has_the_distribution_of_its_own_parameters() -> None:
    """Thousands of rows, neighbours with other parameters; each kind's tokens fit what NumPy says of it."""
    draws, names = 2000, list(CASES)
    logits = {name: some_logits(index) for index, name in enumerate(names)}
    order = np.random.default_rng(1).permutation(np.repeat(np.arange(len(names)), draws))
    histories = [History(row, TOKENS, PROMPT) for row in range(len(order))]
    rows = [row_sampling(request(names[kind]), seed, histories[seed]) for seed, kind in enumerate(order)]
    logits_RV = torch.from_numpy(np.stack([logits[names[kind]] for kind in order]))
    positions_R = np.full(len(rows), len(TOKENS))
    tokens = Sampler().sample(logits_RV, SamplingBatch(rows), positions_R).token_ids_R.numpy()
    for kind, name in enumerate(names):
        expected = distribution(ruled_logits(logits[name], request(name), TOKENS), request(name).sampling)
        assert_fits(np.bincount(tokens[order == kind], minlength=VOCAB), expected, name)


def test_rows_refer_to_the_parameters_of_their_sequences() -> None:
    """Several rows of a sequence in one batch are sampled as one by one, before and after tokens are added."""
    names = list(CASES)
    owners = [index for index in range(len(names)) for _ in range(1 + index % 3)]
    tokens = {name: list(TOKENS) for name in names}

    def batch(name: str) -> SequenceSampling:
        return row_sampling(request(name), 5, History(name, tokens[name], PROMPT))

    together = SamplingBatch([batch(name) for name in names], owners=owners)
    for step in range(3):
        logits_RV = torch.from_numpy(np.stack([some_logits(step + row) for row in range(len(owners))]))
        positions_R = len(TOKENS) + step + np.arange(len(owners)) % 4
        found = Sampler().sample(logits_RV, together, positions_R).token_ids_R
        for row, owner in enumerate(owners):
            alone = SamplingBatch([batch(names[owner])])
            one = Sampler().sample(logits_RV[row : row + 1], alone, positions_R[row : row + 1])
            assert one.token_ids_R[0] == found[row], (names[owner], step, row)
        added = [(7 * step + index) % VOCAB for index in range(len(names))]
        together.add(torch.tensor(added))
        for name, token in zip(names, added, strict=True):
            tokens[name].append(token)


def test_the_cases_differ_from_one_another() -> None:
    """Else the test above could not see parameters swapped between rows."""
    logits = some_logits(0)
    found = {
        name: distribution(ruled_logits(logits, request(name), TOKENS), request(name).sampling).round(3).tobytes()
        for name in CASES
    }
    greedy = {"greedy", "min_p of one", "top_p tiny", "top_k of one"}
    assert len(set(found.values())) >= len(found) - len(greedy) - 1


@pytest.mark.parametrize("name", CASES)
def test_rules_change_a_row_as_numpy_does(name: str) -> None:
    asked, logits = request(name), some_logits(3)
    rules = row_sampling(asked, 0, History("a", TOKENS, PROMPT)).rules or SequenceRules()
    logits_RV = torch.from_numpy(logits.copy())[None]
    batch = RuleBatch([rules], [History("a", TOKENS, PROMPT)], None, CPU)
    batch.apply_(logits_RV, np.array([len(TOKENS)]), None)
    np.testing.assert_allclose(logits_RV[0].numpy(), ruled_logits(logits, asked, TOKENS), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_among_others_gets_the_token_that_it_gets_alone(temperature: float) -> None:
    """Over 300 tokens, in a batch of all cases whose members change, each row with counts kept from step to step."""
    generator = np.random.default_rng(5)
    asked = {name: replace(request(name), sampling=replace(CASES[name][0], temperature=temperature)) for name in CASES}
    tokens = {name: list(TOKENS) for name in CASES}
    batch, present = SamplingBatch(()), list[str]()
    for _ in range(300):
        if not present or generator.random() < 0.2:
            present = [name for name in CASES if generator.random() < 0.8] or ["plain"]
            rows = [row_sampling(asked[name], 7, History(name, tokens[name], PROMPT)) for name in present]
            batch = SamplingBatch(rows, batch)
        logits_RV = torch.from_numpy(generator.normal(size=(len(present), VOCAB)).astype(np.float32) * 3)
        positions_R = np.array([len(tokens[name]) for name in present])
        chosen_R = Sampler().sample(logits_RV, batch, positions_R).token_ids_R
        for row, name in enumerate(present):
            alone = SamplingBatch([row_sampling(asked[name], 7, History(name, tokens[name], PROMPT))])
            single = Sampler().sample(logits_RV[row : row + 1], alone, positions_R[row : row + 1])
            assert int(single.token_ids_R[0]) == int(chosen_R[row]), name
        if generator.random() < 0.3:
            continue  # a step that is not committed
        batch.add(chosen_R)
        for name, token in zip(present, chosen_R.tolist(), strict=True):
            tokens[name].append(token)


def test_greedy_follows_the_rules_over_a_whole_answer() -> None:
    """Against NumPy, token after token: what penalties count is the answer that they shape."""
    asked = Request(
        "a", TOKENS[:PROMPT], 100, Sampling(temperature=0.0, frequency_penalty=0.35, repetition_penalty=1.1)
    )
    logits, tokens = some_logits(8), list(TOKENS[:PROMPT])
    batch = SamplingBatch([row_sampling(asked, 0, History("a", tokens, PROMPT))])
    for _ in range(600):
        chosen_R = Sampler().sample(torch.from_numpy(logits)[None], batch, np.array([len(tokens)])).token_ids_R
        assert int(chosen_R[0]) == int(ruled_logits(logits, asked, tokens).argmax()), tokens
        batch.add(chosen_R)
        tokens.append(int(chosen_R[0]))
    assert len(set(tokens)) == VOCAB


def test_counts_are_those_of_the_histories_whatever_way_they_came() -> None:
    """Grown beyond the first room, taken over by the next batch in another order, or counted anew."""
    generator = np.random.default_rng(2)
    tokens = {key: generator.integers(0, 2000, size=size).tolist() for key, size in (("a", 1), ("b", 700), ("c", 90))}
    prompts = {"a": 1, "b": 600, "c": 90}
    histories = {key: History(key, tokens[key], prompts[key]) for key in tokens}
    counts, keys = TokenCounts(list(histories.values()), None, CPU), list(tokens)
    for step in range(1200):
        if step % 250 == 249:
            keys = generator.permutation(list(tokens)).tolist()
            counts = TokenCounts([histories[key] for key in keys], counts, CPU)
        new = generator.integers(0, 2000, size=len(keys))
        counts.add(torch.from_numpy(new))
        for key, token in zip(keys, new.tolist(), strict=True):
            tokens[key].append(token)
    for row, key in enumerate(keys):
        found = dict(zip(counts.ids_QH[row].tolist(), counts.counts_QH[row].tolist(), strict=True))
        assert found == {token: tokens[key][prompts[key] :].count(token) for token in set(tokens[key])}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.5}], ids=str)
def test_a_row_without_a_token_left_says_so_and_the_others_go_on(temperature: float, filters: dict[str, float]) -> None:
    history = History("a", TOKENS, PROMPT)
    nothing = SequenceRules(allowed_token_ids=(4, 5), bad_words=((4,), (11, 5)))
    free = SequenceSampling(temperature, 0, 1.0, 1)
    rows = [
        free,
        replace(free, rules=nothing, history=history, **filters),
        replace(free, rules=SequenceRules(allowed_token_ids=(6,)), history=history, logprobs=1),
    ]
    logits_RV = torch.from_numpy(np.stack([some_logits(index) for index in range(3)]))
    found = Sampler().sample(logits_RV, SamplingBatch(rows), np.full(3, len(TOKENS)))
    assert found.token_ids_R[1:].tolist() == [NO_TOKEN, 6]
    assert found.token_ids_R[0] >= 0
    assert found.logprobs is not None
    assert torch.isfinite(found.logprobs.chosen_L).all()


@pytest.mark.parametrize("vocab", [31, 32, 33, 1000])
def test_masks_allow_what_their_bits_say(vocab: int) -> None:
    generator = np.random.default_rng(vocab)
    allowed = generator.random((2, vocab)) < 0.2
    allowed[:, -1] = True
    words = np.zeros((2, -(-vocab // 32) * 32), dtype=np.uint8)
    words[:, :vocab] = allowed
    masks = np.packbits(words, axis=1, bitorder="little").view(np.int32)
    rows = [SequenceSampling(0.0, 0, 1.0, 0)] * 4
    for index in (1, 3):
        rows[index] = replace(rows[index], rules=SequenceRules(masked=True), history=History(index, TOKENS, PROMPT))
    batch = SamplingBatch(rows)
    assert batch.masked_rows == [1, 3]
    logits_RV = torch.from_numpy(generator.normal(size=(4, vocab)).astype(np.float32))
    tokens = Sampler().sample(logits_RV, batch, np.zeros(4, dtype=np.int64), masks).token_ids_R.tolist()
    best = logits_RV.argmax(-1).tolist()
    expected = np.where(allowed, logits_RV.numpy()[[1, 3]], -np.inf).argmax(-1).tolist()
    assert tokens == [best[0], expected[0], best[2], expected[1]]


def test_rules_leave_the_logits_and_their_logprobs_as_they_are() -> None:
    logits_RV = torch.from_numpy(some_logits(1))[None]
    before = logits_RV.clone()
    rules = SequenceRules(logit_bias=((2, 100.0),), repetition_penalty=3.0)
    rows = [SequenceSampling(0.0, 0, 1.0, 0, logprobs=0, rules=rules, history=History("a", TOKENS, PROMPT))]
    found = Sampler().sample(logits_RV, SamplingBatch(rows), np.array([len(TOKENS)]))
    assert found.token_ids_R.tolist() == [2]
    assert found.logprobs is not None
    assert found.logprobs.chosen_L[0] == pytest.approx(torch.log_softmax(before[0], -1)[2].item(), abs=1e-5)
    assert torch.equal(logits_RV, before)
