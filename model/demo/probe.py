"""What a network gets right when it is shown the truth so far: an answer counts if each of its tokens is the likeliest.

That is the same as answering greedily, for one forward pass a conversation.
"""

from __future__ import annotations

from collections import Counter
from random import Random

import torch

from divisi.model.demo.batches import Writer
from divisi.model.demo.corpus.words import Split, Words
from divisi.model.demo.network import Network


@torch.no_grad()
def probe(
    network: Network, writer: Writer, split: Split, seed: str, lengths: list[int], thinking: float
) -> dict[str, str]:
    """Right and all answers by kind, over one conversation of each length."""
    words = Words(Random(seed), split)
    right: Counter[str] = Counter()
    all_: Counter[str] = Counter()
    for length in lengths:
        ids, weights = writer.write(words, length, thinking)
        row = torch.tensor([ids])
        logits = network.head(network.hidden(row, network.context(row)))[0]
        hits = (logits[:-1].argmax(-1) == row[0, 1:]).tolist()
        for start, end in _spans(weights):
            kind = writer.kind(ids[start:end], ids[:start])
            all_[kind] += 1
            right[kind] += all(hits[start - 1 : end - 1])
    return {kind: f"{right[kind]}/{all_[kind]}" for kind in sorted(all_)}


def _spans(weights: list[float]) -> list[tuple[int, int]]:
    """Where the assistant speaks."""
    spans, start = [], None
    for index, weight in enumerate([*weights, 0.0]):
        if weight == 1.0 and start is None:
            start = index
        elif weight != 1.0 and start is not None:
            spans.append((start, index))
            start = None
    return spans
