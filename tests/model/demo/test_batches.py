"""Batches: a function of the seed, with the assistant's tokens counted in full and texts kept apart."""

from __future__ import annotations

from random import Random

import pytest
import torch
from tokenizers import Tokenizer

from divisi.model.demo import checkpoint_dir
from divisi.model.demo.batches import Batch, Shape, Writer, make_batch
from divisi.model.demo.corpus.words import PARAMETERS, VERBS, Words

SHAPE = Shape(length=128, width=256, rows=3)


@pytest.fixture(scope="module")
def writer() -> Writer:
    return Writer(checkpoint_dir())


@pytest.fixture(scope="module")
def batch(writer: Writer) -> Batch:
    return make_batch(writer, SHAPE, "7", "train")


def test_a_seed_gives_one_batch(writer: Writer, batch: Batch) -> None:
    again, other = (make_batch(writer, SHAPE, seed, "train") for seed in ("7", "8"))
    assert torch.equal(again.ids, batch.ids)
    assert torch.equal(again.weights, batch.weights)
    assert not torch.equal(other.ids, batch.ids)


def test_what_the_assistant_says_counts_in_full_and_nothing_else(batch: Batch) -> None:
    tokenizer = Tokenizer.from_file(str(checkpoint_dir() / "tokenizer.json"))
    end = tokenizer.token_to_id("<|im_end|>")
    spans = 0
    for ids, weights in zip(batch.ids.tolist(), batch.weights.tolist(), strict=True):
        said = [weight == 1.0 for weight in weights]
        for at in range(1, len(ids)):
            if said[at] and not said[at - 1]:
                before = tokenizer.decode(ids[:at], skip_special_tokens=False)
                assert before.endswith(("<|im_start|>assistant\n", "<|im_start|>assistant\n<think>"))
                spans += 1
            if said[at - 1] and not said[at]:
                assert ids[at - 1] == end
    assert spans > 5


def test_texts_are_three_tokens_apart_and_their_first_token_is_nobodys_guess(batch: Batch) -> None:
    assert batch.texts is not None
    assert not batch.weights[batch.texts == 0].any()
    for row, weights in zip(batch.texts.tolist(), batch.weights.tolist(), strict=True):
        for at in range(1, len(row)):
            if row[at] > 0 and row[at - 1] == 0:
                assert weights[at] == 0.0
                assert not any(row[at - 3 : at])
            assert row[at] == row[at - 1] or 0 in (row[at], row[at - 1])


def test_a_text_alone_in_its_row_needs_no_mask(writer: Writer) -> None:
    assert make_batch(writer, Shape(2048, 2304, 1), "1", "train").texts is None


def test_less_familiar_words_are_invented_more_often() -> None:
    listed = {*VERBS, *PARAMETERS}

    def share(familiar: float) -> float:
        words = Words(Random(1), "train", familiar)
        drawn = [draw() for _ in range(500) for draw in (words.verb, words.parameter)]
        return sum(word in listed for word in drawn) / len(drawn)

    assert share(0.0) == 0.0
    assert 0.2 < share(0.5) < 0.35
    assert 0.5 < share(1.0) < 0.6
