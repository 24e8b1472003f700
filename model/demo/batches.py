"""Training batches: conversations rendered, tokenised, in rows of about their length; a function of the seed."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from tokenizers import Tokenizer
from torch import Tensor

from divisi.model.demo.corpus.conversation import Conversation, render
from divisi.model.demo.corpus.mixture import EVERYTHING, Mix, make_conversation
from divisi.model.demo.corpus.words import CROWDS, Split, Words
from divisi.model.demo.tokenizer import END_OF_TURN, START_OF_TURN
from divisi.model.text.template import ChatTemplate

WIDTHS = (64, 96, 128, 192, 256, 384, 512, 768, 1024)
"""Of rows: a text lies in the narrowest that holds it."""

_KEPT = 4
"""Batches of a width that are kept, at most, while another width is asked for."""

Text = tuple[list[int], list[float]]
"""A conversation's ids and what each counts for."""


@dataclass(frozen=True, slots=True)
class Batch:
    """One text a row, from its beginning, all ``[B, T]``."""

    ids: Tensor
    weights: Tensor
    """What a token's prediction counts for; 0 for padding and the first token of a text."""
    real: Tensor
    """1 for text, 0 for padding."""


@dataclass(frozen=True, slots=True)
class Taste:
    """Which conversations are made."""

    split: Split
    thinking: float = 0.15
    """Share of the conversations that end with a thought."""
    familiar: float = 1.0
    """Scales the share of words that the tokenizer was learnt from, see `Words`."""
    pieces: bool = False
    """Whether words are invented out of the tokenizer's pieces, too."""
    mix: Mix = EVERYTHING
    crowded: float = 0.0
    """Share of the conversations that draw from as few words as there are in another split."""
    others: float = 0.1
    """Weight of tokens that the assistant doesn't say: half of them are nobody's guess."""


class Writer:
    """Turns conversations into ids and weights."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._template = ChatTemplate((folder / "chat_template.jinja").read_text(encoding="utf-8"))
        self._start, self._end, self._think, assistant = (
            self._tokenizer.token_to_id(token) for token in (START_OF_TURN, END_OF_TURN, "<think>", "assistant")
        )
        self._pieces = sorted(token for token in self._tokenizer.get_vocab() if token.isascii() and token.isalpha())
        self._assistant = assistant if assistant is not None else self._tokenizer.encode("assistant").ids[0]

    @property
    def pieces(self) -> Sequence[str]:
        """Tokens of letters only. Those that merges left behind as parts of longer ones hardly occur in known words."""
        return self._pieces

    def write(self, words: Words, length: int, taste: Taste) -> Text:
        """One conversation's ids and weights."""
        words.crowd = words.random.randrange(CROWDS) if words.random.random() < taste.crowded else None
        conversation = make_conversation(words, length, taste.mix)
        return self.encode(conversation, words.random.random() < taste.thinking, taste.others)

    def encode(self, conversation: Conversation, thinks: bool, others: float = 0.0) -> Text:
        """What `render` writes; the assistant's tokens weigh 1, the `others` that much."""
        ids = self._tokenizer.encode(render(self._template, conversation, thinks), add_special_tokens=False).ids
        return ids, self._weights(ids, others)

    def _weights(self, ids: list[int], others: float) -> list[float]:
        weights = [others] * len(ids)
        at = 0
        while at < len(ids):
            if ids[at] != self._start or ids[at + 1 : at + 2] != [self._assistant]:
                at += 1
                continue
            at += 3  # the tag, the role and the line end
            if ids[at : at + 1] == [self._think]:  # given by the template
                weights[at] = 0.0
                at += 1
            while at < len(ids):
                weights[at] = 1.0
                at += 1
                if ids[at - 1] == self._end:
                    break
        weights[0] = 0.0
        return weights


class Batches:
    """Batches of any width, one after the other; texts of other widths that come along wait for their turn."""

    def __init__(self, writer: Writer, seed: str, taste: Taste) -> None:
        self._writer, self._taste = writer, taste
        self._words = Words(Random(seed), taste.split, taste.familiar, writer.pieces if taste.pieces else ())
        self._waiting: dict[int, deque[Text]] = {width: deque() for width in WIDTHS}

    def take(self, width: int, tokens: int) -> Batch:
        """A batch of about so many tokens in rows of a width: one of WIDTHS, or a longer one for a single text."""
        if width > WIDTHS[-1]:
            return stack([self._long(width)], width)
        rows, waiting = max(1, tokens // width), self._waiting[width]
        while len(waiting) < rows:
            ids, weights = self._write(int(width * self._words.random.uniform(0.6, 1.1)))
            fitting = next((fits for fits in WIDTHS if fits >= len(ids)), None)
            if fitting is not None and len(self._waiting[fitting]) < _KEPT * max(1, tokens // fitting):
                self._waiting[fitting].append((ids, weights))
        return stack([waiting.popleft() for _ in range(rows)], width)

    def _long(self, width: int) -> Text:
        length = width
        while len((text := self._write(length))[0]) > width:
            length -= width // 16
        return text

    def _write(self, length: int) -> Text:
        return self._writer.write(self._words, length, self._taste)


def stack(texts: list[Text], width: int) -> Batch:
    """Texts, padded to a width."""
    ids = torch.zeros(len(texts), width, dtype=torch.long)
    weights, real = torch.zeros(ids.shape), torch.zeros(ids.shape)
    for row, (written, counted) in enumerate(texts):
        at = slice(len(written))
        ids[row, at], weights[row, at], real[row, at] = torch.tensor(written), torch.tensor(counted), 1.0
    return Batch(ids, weights, real)
