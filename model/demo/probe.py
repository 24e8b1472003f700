"""What a network gets right when it is shown the truth so far: an answer counts if each of its tokens is the likeliest.

That is the same as answering greedily, for one forward pass a conversation and without a server.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

import torch

from divisi.model.demo.batches import Text, Writer, stack
from divisi.model.demo.corpus.words import Split, Words
from divisi.model.demo.evaluation.cases import SKILLS
from divisi.model.demo.network import Network

_ROWS = 8


@torch.no_grad()
def probe(network: Network, writer: Writer, skill: str, count: int, split: Split) -> int:
    """How many of `count` last answers are right. Raises KeyError for a skill that is none of SKILLS."""
    texts = sorted(_texts(writer, skill, count, split), key=lambda text: len(text[0]))
    right = 0
    for at in range(0, count, _ROWS):
        rows = texts[at : at + _ROWS]
        batch = stack(rows, len(rows[-1][0]))
        hidden = network.hidden(batch.ids, network.context(batch.real))
        for row, (ids, weights) in enumerate(rows):
            start, end = _last_answer(weights)
            said = network.head(hidden[row, start - 1 : end - 1]).argmax(-1)
            right += said.tolist() == ids[start:end]
    return right


def _texts(writer: Writer, skill: str, count: int, split: Split) -> Iterator[Text]:
    for index in range(count):
        words = Words(Random(f"probe/{skill}/{index}"), split)
        yield writer.encode(SKILLS[skill](words), skill.startswith("thinking"))


def _last_answer(weights: list[float]) -> tuple[int, int]:
    end = max(index for index, weight in enumerate(weights) if weight == 1.0) + 1
    start = end
    while weights[start - 1] == 1.0:
        start -= 1
    return start, end
