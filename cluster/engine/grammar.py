"""Keeps answers inside their grammars (llguidance): compiles grammars and computes token masks, in threads of its own.

llguidance gives up the interpreter lock while it compiles and computes masks. It may take its time, or raise: neither
reaches beyond the answer whose grammar it is.

A `Guide` follows one answer. What it allows depends on the grammar and the committed tokens alone: it catches up with
these when a mask is wanted. Tokens that a step merely proposes are taken by a copy of it. So an aborted step leaves
nothing to undo, and a preempted sequence finds its guide where its tokens are.

Shapes: G guides, B = ceil(V / 32) words of 32 tokens each, the lowest bit first.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock, Timer
from typing import NamedTuple

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLParserLimits
from numpy.typing import NDArray

from divisi.cluster.request import EndReason
from divisi.model.text.errors import TextError
from divisi.model.text.grammar.tokens import GrammarVocabulary

log = logging.getLogger(__name__)

COMPILE_S = 30.0
"""Longest wait for a guide. The ingress has compiled the grammar before, within a limit on its CPU time."""
_COMPILERS = 2
"""Threads, so that a grammar that takes long holds up nobody but another one of its kind."""
_OURS = "doesn't satisfy the grammar"
"""What llguidance says of a token that its mask should not have allowed."""


@dataclass(slots=True)
class Scout:
    """A copy of a guide's matcher that has taken tokens which may not be committed."""

    matcher: LLMatcher
    taken: list[int]


@dataclass(slots=True)
class Guide:
    """Follows one answer through its grammar."""

    matcher: LLMatcher | None
    eos_ids: frozenset[int] = frozenset()
    followed: int = 0
    """Tokens of the answer that the matcher has taken."""
    error: str | None = None
    """Why the grammar can be followed no further."""
    scout: Scout | None = None
    """Has taken proposed tokens besides."""
    ends: EndReason = "error"
    """With an error, how it ends: "rejected" where the grammar asks for too much, "cancelled" where others do."""

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
            self.scout = None
            self.check()

    def look_ahead(self, proposed: Sequence[int]) -> LLMatcher | None:
        """A matcher that has taken `proposed` after the committed tokens; None where the grammar cannot be followed.

        The guide's own stays where it is: llguidance takes tokens back only in some grammars, and not always rightly.
        """
        if self.matcher is None or self.error:
            return None
        scout = self.scout
        if scout is None or list(proposed[: len(scout.taken)]) != scout.taken:
            scout = self.scout = Scout(self.matcher.deep_copy(), [])
        if missing := list(proposed[len(scout.taken) :]):
            scout.matcher.consume_tokens(missing)
            scout.taken += missing
        return None if scout.matcher.is_error() else scout.matcher

    def check(self) -> None:
        """Take note of what went wrong in the matcher, such as a limit that the grammar exceeds."""
        if self.matcher is not None and self.matcher.is_error():
            self.error = _first_line(self.matcher.get_error())
            if _OURS in self.error:
                log.error("the grammar library refuses a token of its own mask: %s", self.error)
                self.error, self.ends = "its mask and its parser disagree", "error"
            else:
                self.ends = "rejected"

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """Give up on this guide alone after an exception of the library, whose matcher is in an unknown state."""
        try:
            yield
        except BaseException as error:  # noqa: BLE001 - a panic of the library is no Exception
            log.error("the grammar library failed: %r", error)
            self.matcher, self.scout, self.error = None, None, "the grammar library failed"


class Guided(NamedTuple):
    """An answer and its guide: the committed `tokens` from `start` on, before which the prompt stands.

    `proposed` are those that a step proposes to follow.
    """

    guide: Guide
    tokens: Sequence[int]
    start: int
    proposed: tuple[int, ...] = ()


class Grammars:
    """The grammars of one worker. `compile` and `start` return at once; their work is done in other threads."""

    def __init__(
        self,
        load: Callable[[], GrammarVocabulary],
        vocab_size: int,
        *,
        threads: int = 1,
        limits: LLParserLimits | None = None,
        compile_s: float = COMPILE_S,
    ) -> None:
        """`load` is called once, in another thread. `threads`: for the masks of one step."""
        self._load = load
        self._compile_s = compile_s
        self._words = -(-vocab_size // 32)
        self._limits = limits or LLParserLimits(verbose_errors=False)
        self._vocabulary: GrammarVocabulary | None = None
        self._reading = Lock()
        self._executor = LLExecutor(threads)
        # No mask waits for a grammar being compiled; one thread for the masks, so that guides need no lock.
        self._compiler = ThreadPoolExecutor(_COMPILERS, "grammar-compiler")
        self._masker = ThreadPoolExecutor(1, "grammar-masks")

    def prepare(self) -> None:
        """Begin to read the tokenizer, which takes the interpreter from everybody else: better before anybody waits."""
        self._compiler.submit(self._compile, "start: /./")

    def compile(self, grammar: str) -> Future[Guide]:
        """A guide at the start of an answer, within `compile_s`. It has an `error` where there can be none."""
        promised: Future[Guide] = Future()
        work = self._compiler.submit(lambda: _settle(promised, self._compile(grammar)))

        def give_up() -> None:
            begun = not work.cancel()
            what = "the grammar takes longer to compile than" if begun else "compiling other grammars took more than"
            remedy = "simplify it" if begun else "send the request again"
            ends: EndReason = "rejected" if begun else "cancelled"
            _settle(promised, Guide(None, error=f"{what} {self._compile_s:g} s; {remedy}", ends=ends))

        timer = Timer(self._compile_s, give_up)
        timer.daemon = True
        timer.start()

        def clean_up(_: Future[Guide]) -> None:
            timer.cancel()
            work.cancel()

        promised.add_done_callback(clean_up)
        return promised

    def start(self, answers: Sequence[Guided]) -> Future[NDArray[np.int32]]:
        """Begin to compute the masks, int32 [G, B], of the tokens that may follow each answer.

        A guide that has an `error`, now or before, gets a mask that allows nothing, and so does an answer whose
        proposed tokens cannot be followed, which is no error. A guide comes once in a call. The answers must stay as
        they are until the masks are there; those of an earlier call are computed first.
        """
        return self._masker.submit(self._masks, answers)

    @property
    def nothing(self) -> NDArray[np.int32]:
        """A mask, int32 [B], that allows no token."""
        return np.zeros(self._words, dtype=np.int32)

    def _compile(self, grammar: str) -> Guide:
        guide = Guide(None)
        with guide.guarded():
            try:
                vocabulary = self._read_vocabulary()
            except (TextError, OSError) as error:
                log.warning("no grammar can be used: %s", error)
                guide.error = "the model's tokenizer cannot be used for grammars"
                return guide
            # One of its own for each answer: copies share a lexer, and with it the limit that one of them exceeds.
            guide.matcher = LLMatcher(vocabulary.tokenizer, grammar, log_level=0, limits=self._limits)
            guide.eos_ids = vocabulary.eos_ids
            guide.check()
        return guide

    def _read_vocabulary(self) -> GrammarVocabulary:
        with self._reading:
            if self._vocabulary is None:
                self._vocabulary = self._load()
            return self._vocabulary

    def _masks(self, answers: Sequence[Guided]) -> NDArray[np.int32]:
        masks_GB = np.zeros((len(answers), self._words), dtype=np.int32)
        able: list[tuple[LLMatcher, int]] = []
        for row, answer in enumerate(answers):
            guide = answer.guide
            with guide.guarded():
                guide.follow(answer.tokens, answer.start)
                matcher = guide.look_ahead(answer.proposed) if answer.proposed else guide.matcher
                if matcher is not None and not guide.error:
                    able.append((matcher, row))
        try:
            self._compute(able, masks_GB)
        except BaseException:  # noqa: BLE001 - whose fault it is shows one by one
            for matcher, row in able:
                with answers[row].guide.guarded():
                    self._compute([(matcher, row)], masks_GB)
        for matcher, row in able:
            guide, mask_B = answers[row].guide, masks_GB[row]
            with guide.guarded():
                guide.check()
                _keep_open(guide.eos_ids, matcher, mask_B)
            if guide.error or matcher.is_error():
                mask_B[:] = 0  # llguidance lets an answer end where it fails
        return masks_GB

    def _compute(self, able: list[tuple[LLMatcher, int]], masks_GB: NDArray[np.int32]) -> None:
        if able:
            self._executor.unsafe_compute_mask_ptr(able, masks_GB.ctypes.data, self._words * 4, len(masks_GB))


def _settle(promised: Future[Guide], guide: Guide) -> None:
    """Keep a promise, unless it was kept or cancelled before."""
    with contextlib.suppress(InvalidStateError):
        promised.set_result(guide)


def _keep_open(eos_ids: frozenset[int], matcher: LLMatcher, mask_B: NDArray[np.int32]) -> None:
    """Take the end of the answer from a mask while the grammar is incomplete; it may name such a token inside."""
    words_B = mask_B.view(np.uint32)
    for token_id in eos_ids:
        word, bit = token_id // 32, np.uint32(1 << token_id % 32)
        if words_B[word] & bit and (matcher.is_error() or not matcher.is_accepting()):
            words_B[word] &= ~bit


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or ["unknown error"])[0][:300]
