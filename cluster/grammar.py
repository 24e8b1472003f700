"""Keeps answers inside their grammars (llguidance): compiles grammars and computes token masks, in threads of its own.

A `Guide` follows one answer. What it allows depends on the grammar and the committed tokens alone: it catches up with
these when a mask is wanted, never with a token that a step merely proposes. So an aborted step leaves nothing to undo,
and a preempted sequence finds its guide where its tokens are.

Shapes: G guides, B = ceil(V / 32) words of 32 tokens each, the lowest bit first.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer
from numpy.typing import NDArray

from divisi.model.text.codec import TextCodec

log = logging.getLogger(__name__)


class GrammarVocabulary(NamedTuple):
    """The tokens that masks are about; `eos_ids` end an answer whose grammar is complete."""

    tokenizer: LLTokenizer
    eos_ids: frozenset[int]

    @staticmethod
    def load(model_dir: str | Path, vocab_size: int) -> GrammarVocabulary:
        """Read a model's tokenizer; takes about 6 us per token. Raises TextError."""
        eos_ids = TextCodec.load(model_dir).eos_ids
        # The content, since a file with a byte order mark is nothing that the library reads.
        content = (Path(model_dir) / "tokenizer.json").read_text(encoding="utf-8-sig")
        return GrammarVocabulary(LLTokenizer(content, n_vocab=vocab_size, eos_token=sorted(eos_ids)), eos_ids)


@dataclass(slots=True)
class Guide:
    """Follows one answer through its grammar."""

    matcher: LLMatcher | None
    eos_ids: frozenset[int] = frozenset()
    followed: int = 0
    """Tokens of the answer that the matcher has taken."""
    error: str | None = None
    """Why the grammar can be followed no further."""

    @property
    def is_complete(self) -> bool:
        """Whether the answer may end where the guide stands."""
        return self.matcher is not None and not self.error and self.matcher.is_accepting()

    def follow(self, tokens: Sequence[int], start: int) -> None:
        """Catch up with an answer: the committed `tokens` from `start` on."""
        missing = tokens[start + self.followed :]
        if self.matcher is not None and not self.error and missing:
            self.matcher.consume_tokens(list(missing))
            self.followed += len(missing)
            self.check()

    def check(self) -> None:
        """Take note of what went wrong in the matcher, such as a limit that the grammar exceeds."""
        if self.matcher is not None and self.matcher.is_error():
            self.error = _first_line(self.matcher.get_error())


class Answer(NamedTuple):
    """An answer and its guide: the committed `tokens` from `start` on, before which the prompt stands."""

    guide: Guide
    tokens: Sequence[int]
    start: int


class Grammars:
    """The grammars of one worker. `compile` and `start` return at once; their work is done in other threads."""

    def __init__(
        self,
        load: Callable[[], GrammarVocabulary],
        vocab_size: int,
        *,
        threads: int = 1,
        limits: LLParserLimits | None = None,
    ) -> None:
        """`load` is called once, in another thread. `threads`: for the masks of one step."""
        self._load = load
        self._words = -(-vocab_size // 32)
        self._limits = limits or LLParserLimits(verbose_errors=False)
        self._vocabulary: GrammarVocabulary | None = None
        self._executor = LLExecutor(threads)
        # One thread each, so that neither needs a lock, and no mask waits for a grammar being compiled.
        self._compiler = ThreadPoolExecutor(1, "grammar-compiler")
        self._masker = ThreadPoolExecutor(1, "grammar-masks")

    def prepare(self) -> None:
        """Begin to read the tokenizer, which takes the interpreter from everybody else: better before anybody waits."""
        self._compiler.submit(self._compile, "start: /./")

    def compile(self, grammar: str) -> Future[Guide]:
        """A guide at the start of an answer. It has an `error` where the grammar or the tokenizer cannot be used."""
        return self._compiler.submit(self._compile, grammar)

    def start(self, answers: Sequence[Answer]) -> Future[NDArray[np.int32]]:
        """Begin to compute the masks, int32 [G, B], of the tokens that may follow each answer.

        A guide that has an `error`, now or before, gets a mask that allows nothing. The answers must stay as they are
        until the masks are there; those of an earlier call are computed first.
        """
        return self._masker.submit(self._masks, answers)

    def _compile(self, grammar: str) -> Guide:
        try:
            if self._vocabulary is None:
                self._vocabulary = self._load()
            # One of its own for each answer: copies share a lexer, and with it the limit that one of them exceeds.
            matcher = LLMatcher(self._vocabulary.tokenizer, grammar, log_level=0, limits=self._limits)
        except (ValueError, OSError) as error:  # TextError, or what llguidance says of a tokenizer
            log.warning("no grammar can be used: %s", error)
            return Guide(None, error=f"the model's tokenizer cannot be used for grammars: {_first_line(str(error))}")
        guide = Guide(matcher, self._vocabulary.eos_ids)
        guide.check()
        return guide

    def _masks(self, answers: Sequence[Answer]) -> NDArray[np.int32]:
        masks_GB = np.zeros((len(answers), self._words), dtype=np.int32)
        for answer in answers:
            answer.guide.follow(answer.tokens, answer.start)
        guides = [answer.guide for answer in answers]
        able = [(guide.matcher, row) for row, guide in enumerate(guides) if guide.matcher and not guide.error]
        if able:
            self._executor.unsafe_compute_mask_ptr(able, masks_GB.ctypes.data, self._words * 4, len(answers))
        for row, guide in enumerate(guides):
            guide.check()
            if guide.error:
                masks_GB[row] = 0  # llguidance lets an answer end where it fails
        return masks_GB


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or ["unknown error"])[0][:300]
