"""Training batches: conversations rendered, tokenised and packed in rows, a function of seed, step and worker only."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from tokenizers import Tokenizer
from torch import Tensor

from divisi.model.demo.corpus.conversation import render
from divisi.model.demo.corpus.mixture import make_conversation
from divisi.model.demo.corpus.tools import NO_TOOL
from divisi.model.demo.corpus.words import Split, Words
from divisi.model.demo.tokenizer import END_OF_TURN, START_OF_TURN
from divisi.model.text.template import ChatTemplate

_OTHERS = 0.1
"""Weight of tokens that the assistant doesn't say: half of them are nobody's guess."""

_GAP = 3
"""Tokens of padding between texts in a row, as far as a convolution reaches back."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of packed texts, all ``[B, T]``."""

    ids: Tensor
    texts: Tensor | None
    """Texts numbered from 1 in each row, 0 for padding; None for one text a row without padding before its end."""
    weights: Tensor
    """What a token's prediction counts for; 0 for padding and the first token of a text."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Conversations of about `length` tokens in `rows` rows of `width`."""

    length: int
    width: int
    rows: int


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

    def write(self, words: Words, length: int, thinking: float) -> tuple[list[int], list[float]]:
        """One conversation's ids and weights."""
        conversation = make_conversation(words, length)
        thinks = words.random.random() < thinking
        ids = self._tokenizer.encode(render(self._template, conversation, thinks), add_special_tokens=False).ids
        return ids, self._weights(ids)

    def kind(self, said: list[int], before: list[int]) -> str:
        """What sort of answer some ids are."""
        text = self._tokenizer.decode(said, skip_special_tokens=True)
        asked = self._tokenizer.decode(before[-60:], skip_special_tokens=False).split(START_OF_TURN)[-2]
        think = " thinking" if "</think>" in text else ""
        if "<tool_call>" in text:
            return ("call" if text.count("<tool_call>") == 1 else "calls") + think
        if NO_TOOL in text:
            return "refusal" + think
        if "<tool_response>" in asked:
            return "tool answer" + think
        if re.fullmatch(r"\d+ [-+*] \d+ = \d+\.", text.split("\n")[-1]):
            return "sum" + think
        if asked.startswith("user\n") and re.search(r"(Say|Repeat|Repeat after me|Write|Echo): ", asked):
            return "echo" + think
        return ("recall" if re.fullmatch(r"The \S+ of \S+ is .*\.", text.split("\n")[-1]) else "chat") + think

    def _weights(self, ids: list[int]) -> list[float]:
        weights = [_OTHERS] * len(ids)
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


def make_batch(
    writer: Writer,
    shape: Shape,
    seed: str,
    split: Split,
    thinking: float = 0.15,
    familiar: float = 1.0,
    pieces: bool = False,
) -> Batch:
    """A batch that depends on its arguments only. `pieces`: invent words out of the tokenizer's pieces, too."""
    words = Words(Random(seed), split, familiar, writer.pieces if pieces else ())
    ids = torch.zeros(shape.rows, shape.width, dtype=torch.long)
    texts = torch.zeros(shape.rows, shape.width, dtype=torch.long)
    weights = torch.zeros(shape.rows, shape.width)
    used = [0] * shape.rows
    misses = number = 0
    while misses < 3:
        written, counted = writer.write(words, shape.length, thinking)
        row = min(range(shape.rows), key=lambda index: (used[index] + len(written) > shape.width, -used[index]))
        if used[row] + len(written) > shape.width:
            misses += 1
            if any(used):
                continue
            written, counted = written[: shape.width], counted[: shape.width]
        number += 1
        at = slice(used[row], used[row] + len(written))
        ids[row, at], weights[row, at], texts[row, at] = torch.tensor(written), torch.tensor(counted), number
        used[row] += len(written) + _GAP
    alone = shape.rows == number and shape.rows == sum(count > 0 for count in used)
    return Batch(ids, None if alone and shape.rows == 1 else texts, weights)
