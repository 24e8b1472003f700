"""Batches: a function of the seed, one text a row, with the assistant's tokens counted in full."""

from __future__ import annotations

from random import Random

import pytest
import torch
from tokenizers import Tokenizer

from divisi.model.demo import checkpoint_dir
from divisi.model.demo.batches import WIDTHS, Batch, Batches, Taste, Writer
from divisi.model.demo.corpus.words import CROWDS, PARAMETERS, VERBS, Words

WIDTH, TOKENS = 192, 1024
TRAIN = Taste("train")


@pytest.fixture(scope="module")
def writer() -> Writer:
    return Writer(checkpoint_dir())


@pytest.fixture(scope="module")
def batch(writer: Writer) -> Batch:
    return Batches(writer, "7", TRAIN).take(WIDTH, TOKENS)


def test_a_seed_gives_one_sequence_of_batches(writer: Writer) -> None:
    first, again, other = (Batches(writer, seed, TRAIN) for seed in ("7", "7", "8"))
    for width in (WIDTH, 96, WIDTH):
        found, same, different = (batches.take(width, TOKENS) for batches in (first, again, other))
        assert torch.equal(found.ids, same.ids)
        assert torch.equal(found.weights, same.weights)
        assert not torch.equal(found.ids, different.ids)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_text_lies_in_the_narrowest_rows_that_hold_it(writer: Writer, width: int) -> None:
    batch = Batches(writer, "7", TRAIN).take(width, TOKENS)
    assert batch.ids.shape == (TOKENS // width, width)
    narrower = max((other for other in WIDTHS if other < width), default=0)
    for real, weights in zip(batch.real, batch.weights, strict=True):
        count = int(real.sum())
        assert narrower < count <= width
        assert real[:count].all()
        assert weights[0] == 0.0
        assert not weights[count:].any()


def test_a_long_text_has_a_row_of_its_own_and_is_whole(writer: Writer) -> None:
    batch = Batches(writer, "7", TRAIN).take(2304, TOKENS)
    assert batch.ids.shape == (1, 2304)
    tokenizer = Tokenizer.from_file(str(checkpoint_dir() / "tokenizer.json"))
    count = int(batch.real.sum())
    assert count > 0.7 * 2304
    assert tokenizer.decode(batch.ids[0, :count].tolist(), skip_special_tokens=False).endswith("<|im_end|>\n")


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


def test_less_familiar_words_are_invented_more_often() -> None:
    listed = {*VERBS, *PARAMETERS}

    def share(familiar: float) -> float:
        words = Words(Random(1), "train", familiar)
        drawn = [draw() for _ in range(500) for draw in (words.verb, words.parameter)]
        return sum(word in listed for word in drawn) / len(drawn)

    assert share(0.0) == 0.0
    assert 0.2 < share(0.5) < 0.35
    assert 0.5 < share(1.0) < 0.6


def test_crowded_conversations_draw_from_few_words(writer: Writer) -> None:
    words, taste = Words(Random(3), "train"), Taste("train", crowded=0.5)
    seen = set()
    for _ in range(40):
        writer.write(words, 128, taste)
        seen.add(words.crowd)
    assert None in seen
    assert len(seen) > CROWDS / 2
