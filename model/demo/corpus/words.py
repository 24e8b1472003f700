"""Words for names and values, real ones and invented ones, each in one of three splits by its hash."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from functools import cache
from itertools import product
from pathlib import Path
from random import Random
from typing import Literal

Split = Literal["train", "dev", "held_out"]
"""`dev` is to choose by, `held_out` to measure by, once all is chosen."""

_SPLITS: dict[int, Split] = {0: "held_out", 6: "dev"}
_OF = 12
"""One word in so many is in each of these."""

_LISTS: dict[str, list[str]] = json.loads(Path(__file__).with_name("words.json").read_text(encoding="utf-8"))
VERBS = _LISTS["verbs"]
NOUNS = _LISTS["nouns"]
PARAMETERS = _LISTS["parameters"]
ADJECTIVES = _LISTS["adjectives"]
NAMES = _LISTS["names"]
CITIES = _LISTS["cities"]
_ONSETS = _LISTS["onsets"]
_VOWELS = _LISTS["vowels"]
_CODAS = _LISTS["codas"]


def split_of(text: str) -> Split:
    """The split that a word or phrasing belongs to, for ever."""
    return _SPLITS.get(zlib.crc32(text.lower().encode()) % _OF, "train")


CROWDS = _OF - 2
"""Parts of the training words, each about as large as another split."""


@cache
def words_of(words: tuple[str, ...], split: Split, crowd: int | None = None) -> tuple[str, ...]:
    """The words of a list that a split may use, or one of its CROWDS parts."""
    return tuple(
        word
        for word in dict.fromkeys(words)
        if split_of(word) == split and (crowd is None or zlib.crc32(word.encode()) // _OF % CROWDS == crowd)
    )


@cache
def can_phrase(parts: tuple[tuple[str, ...], ...], split: Split) -> bool:
    """Whether any combination of one of each list belongs to a split; of few combinations none may."""
    return any(split_of("|".join(chosen)) == split for chosen in product(*parts))


class Words:
    """Draws words of one split. `familiar` scales the share of listed words, in place of which others are invented,
    half of them out of `pieces` where there are some.
    """

    def __init__(self, random: Random, split: Split, familiar: float = 1.0, pieces: Sequence[str] = ()) -> None:
        self.random = random
        self._familiar = familiar
        self._pieces = pieces
        self.split: Split = split
        self.crowd: int | None = None
        """The part of the listed words that is drawn from; few words mean several things in one text."""

    def of(self, words: Sequence[str]) -> str:
        """One of a list's words."""
        return self.random.choice(words_of(tuple(words), self.split, self.crowd))

    def phrasing(self, *parts: tuple[str, ...]) -> list[str]:
        """One of each list, in a combination that belongs to the split; the strings, not their parts, are held out.

        Raises ValueError where none does, see `can_phrase`.
        """
        if not can_phrase(parts, self.split):
            raise ValueError(f"parts: no combination of {parts} is in the split {self.split!r}; give more of them")
        while True:
            chosen = [self.random.choice(part) for part in parts]
            if split_of("|".join(chosen)) == self.split:
                return chosen

    def invented(self, syllables: int | None = None) -> str:
        """A word that nobody has seen."""
        while True:
            count = syllables or self.random.choice((1, 2, 2, 2, 3))
            draw = self.random.choice
            if self._pieces and self.random.random() < 0.5:
                word = "".join(draw(self._pieces) for _ in range(count))
            else:
                word = "".join(draw(_ONSETS) + draw(_VOWELS) + draw(_CODAS) for _ in range(count))
            if len(word) > 2 and split_of(word) == self.split:
                return word

    def verb(self) -> str:
        """A verb, now and then an invented one."""
        return self.of(VERBS) if self.random.random() < 0.6 * self._familiar else self.invented()

    def noun(self) -> str:
        """A noun, often an invented one."""
        return self.of(NOUNS) if self.random.random() < 0.5 * self._familiar else self.invented()

    def parameter(self) -> str:
        """A parameter's name."""
        draw = self.random.random()
        if draw < 0.5 * self._familiar:
            return self.of(PARAMETERS)
        if draw < 0.8:
            return self.invented()
        return f"{self.of(PARAMETERS)}_{self.noun()}"

    def proper(self) -> str:
        """A person's, a place's or a thing's name."""
        draw = self.random.random()
        if draw < 0.25 * self._familiar:
            return self.of(NAMES)
        if draw < 0.4 * self._familiar:
            return self.of(CITIES)
        return self.invented().capitalize()

    def integer(self) -> int:
        """A number of one to five digits."""
        return self.random.randrange(10 ** self.random.choice((1, 1, 2, 2, 3, 4, 5)))

    def code(self) -> str:
        """Letters and digits."""
        letters = "".join(self.random.choice("ABCDEFGHKLMNPRSTUVWXYZ") for _ in range(self.random.choice((1, 2))))
        digits = "".join(self.random.choice("0123456789") for _ in range(self.random.choice((2, 3, 4))))
        return self.random.choice((letters + digits, f"{letters}-{digits}", digits))

    def text(self) -> str:
        """A string value: a word, a name, a code, a few words."""
        draw = self.random.random()
        if draw < 0.25:
            return self.proper()
        if draw < 0.4:
            return self.of(ADJECTIVES)
        if draw < 0.6:
            return self.invented()
        if draw < 0.7:
            return self.noun()
        if draw < 0.8:
            return self.code()
        if draw < 0.9:
            return f"{self.proper()} {self.proper()}"
        return " ".join(self.random.choice((self.noun, self.invented, self.proper))() for _ in range(3))
