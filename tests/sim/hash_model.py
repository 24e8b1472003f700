"""A model whose next token is a hash of the sequence so far, once from its memory and once as an oracle.

The memory follows the rules of the real one: KV at the rows that the page table gives, a state slot that stands at a
position, a ring entry that the next step replays, and the slots in which a prefill leaves its states. Whatever the
scheduler gets wrong about pages, slots, positions or committed lengths changes the tokens.
"""

from __future__ import annotations

from collections.abc import Iterable

from divisi.cluster.engine.memory.sequence_memory import PageGrowth
from divisi.cluster.engine.scheduler import SchedulerConfig
from divisi.cluster.engine.sequence import Sequence
from divisi.cluster.engine.step.plan import Run, RunKind, StepPlan
from divisi.cluster.request import EndReason, Request
from divisi.cluster.triggers import Triggers

VOCAB = 61
_EMPTY = 17
_GARBAGE = 0x5EED
_NOWHERE = (-1, _GARBAGE)
_CHECK_EVERY = 4


def choose(request: Request, generated: int, history: int) -> int:
    """The token after a history of which `generated` tokens are the answer's."""
    draw = hash((history, request.sampling.seed))
    while generated < request.min_tokens and draw % VOCAB in request.stop_ids | request.content_stop_ids:
        draw = hash((draw,))
    return draw % VOCAB


def is_complete(request: Request, generated: int) -> bool:
    """Whether the grammar allows no further token: here a grammar is the number of tokens that it has."""
    return request.grammar is not None and generated >= int(request.grammar)


def expected_answer(request: Request, max_model_len: int) -> tuple[list[int], EndReason, int | None]:
    """Tokens, finish reason and stop id of a request, from nothing but itself."""
    history = _EMPTY
    for token in request.prompt:
        history = hash((history, token))
    answer: list[int] = []
    triggers = Triggers(request.spans)
    while len(answer) < min(request.max_tokens, max_model_len - len(request.prompt)):
        if is_complete(request, len(answer)):
            return answer, "stop", None
        token = choose(request, len(answer), history)
        if token in request.stop_ids | (request.content_stop_ids if triggers.take(token) else frozenset()):
            return answer, "stop", token
        answer.append(token)
        history = hash((history, token))
    return answer, "length", None


class HashModel:
    """Runs plans on its memory."""

    def __init__(self, config: SchedulerConfig) -> None:
        self._page_size = config.page_size
        self._kv = [_GARBAGE] * (config.num_pages * config.page_size)
        self._slots = [_NOWHERE] * config.num_slots
        self._rings = [_NOWHERE] * config.num_slots
        self._tables = [[-1] * config.max_pages_per_sequence for _ in range(config.max_seqs)]

    def grow(self, growths: Iterable[PageGrowth]) -> None:
        """Enter new pages into the page tables."""
        for table, start, pages in growths:
            self._tables[table][start : start + len(pages)] = pages

    def attempt(self, plan: StepPlan, stop_after: int | None = None) -> list[list[int]]:
        """Compute a step, return the tokens of its runs; with `stop_after`, of so many only, as if it aborted."""
        tokens: list[list[int]] = []
        for run in plan.runs[:stop_after]:
            history = self._ring(run) if run.kind is RunKind.RING else self._scan(run)
            tokens.append([choose(run.sequence.request, run.sequence.num_generated, history)] if run.chooses else [])
        return tokens

    def _ring(self, run: Run) -> int:
        sequence, length, slot = run.sequence, run.start, run.source
        if self._rings[slot][0] == length:
            self._slots[slot] = self._rings[slot]
        before = self._kv[self._at(sequence, length - 1)]
        intact = self._slots[slot] == (length, before)
        if length % _CHECK_EVERY == 0:
            intact = intact and self._history_is_whole(sequence)
        after = hash((before, sequence.tokens[length])) if intact else _GARBAGE
        self._kv[self._at(sequence, length)] = after
        self._rings[slot] = (length + 1, after)
        return after

    def _scan(self, run: Run) -> int:
        sequence, history, leaves = run.sequence, _EMPTY, dict(run.leaves)
        if run.start:
            history = self._kv[self._at(sequence, run.start - 1)]
            if self._slots[run.source] != (run.start, history):
                history = _GARBAGE
        for position in range(run.start, run.end):
            history = hash((history, sequence.tokens[position]))
            self._kv[self._at(sequence, position)] = history
            if (slot := leaves.get(position + 1)) is not None:
                self._slots[slot], self._rings[slot] = (position + 1, history), _NOWHERE
        return history

    def _history_is_whole(self, sequence: Sequence) -> bool:
        history = _EMPTY
        for position in range(sequence.length):
            history = hash((history, sequence.tokens[position]))
            if self._kv[self._at(sequence, position)] != history:
                return False
        return True

    def _at(self, sequence: Sequence, position: int) -> int:
        page = self._tables[sequence.holding.table][position // self._page_size]
        return page * self._page_size + position % self._page_size
