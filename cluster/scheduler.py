"""Decides what each step computes. Plain Python: no tensors, no clock, no I/O.

The rules, in order:

1. Every decoding sequence gets its token. One that needs a page when none is free takes it from the latest arrival
   (perhaps itself), which goes back to the head of the queue and computes its tokens again later.
2. Prefill chunks fill what is left of the token budget, in order of arrival.
3. The queue is admitted strictly in order of arrival, when a row, a slot, a spare and all pages of the prefill are
   free, plus one page of headroom for each running sequence so that admission does not cause a preemption at once.

So the sequences that run are always the earliest that are alive, the very earliest always advances, and none starves.

A step is planned, run as often as it takes, and committed. What planning changes (admission, pages, preemption) stands
on its own: pages taken for a step that aborts stay with their sequences and serve the replay.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping

from pydantic import BaseModel, ConfigDict, Field, model_validator

from divisi.cluster.errors import RequestRejected
from divisi.cluster.grammar import Guide
from divisi.cluster.pages import PagePool, pages_for
from divisi.cluster.plan import Chunk, Outcome, PageGrowth, StepPlan
from divisi.cluster.request import FinishReason, Request
from divisi.cluster.request_check import check_request
from divisi.cluster.sequence import NOTHING, Sequence, Status
from divisi.cluster.slots import SLOTS_TO_PREFILL, SlotPool


class SchedulerConfig(BaseModel):
    """Sizes of the pools and limits of a step."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    vocab_size: int = Field(ge=1)
    max_model_len: int = Field(ge=2, description="Tokens of prompt and answer together.")
    num_pages: int = Field(ge=1)
    page_size: int = Field(ge=1, description="Tokens per page.")
    num_slots: int = Field(ge=SLOTS_TO_PREFILL, description="State slots; a prefilling sequence holds two.")
    max_seqs: int = Field(default=64, ge=1, description="Sequences that run at once.")
    max_step_tokens: int = Field(default=2048, ge=1)
    max_prompt_logit_rows: int = Field(
        default=128, ge=1, description="Prompt positions per step whose logits are kept for prompt log-probabilities."
    )

    @model_validator(mode="after")
    def _decodes_fit_a_step(self) -> SchedulerConfig:
        if self.max_step_tokens < self.max_seqs:
            raise ValueError(
                f"max_step_tokens is {self.max_step_tokens} but must hold one token of each of "
                f"max_seqs = {self.max_seqs} sequences: raise max_step_tokens or lower max_seqs"
            )
        return self

    @property
    def max_pages_per_sequence(self) -> int:
        """Pages of the longest sequence that can be served."""
        return min(self.num_pages, pages_for(self.max_model_len, self.page_size))


class Scheduler:
    """The queue, the running sequences and the pools of one attention worker."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.pages = PagePool(config.num_pages)
        self.slots = SlotPool(config.num_slots)
        self.preemptions = 0
        self.running: list[Sequence] = []
        """In order of arrival."""
        self.waiting: deque[Sequence] = deque()
        """In order of arrival; all arrived after the running ones."""
        self.outstanding: StepPlan | None = None
        self._sequences: dict[str, Sequence] = {}
        self._rows = list(range(config.max_seqs - 1, -1, -1))
        self._growths: list[PageGrowth] = []
        self._arrivals = 0

    def submit(self, request: Request, guide: Guide | None = None) -> Sequence:
        """Queue a request; `guide` belongs to its grammar. Raises RequestRejected, see `check`."""
        max_tokens = self.check(request)
        sequence = Sequence(request, self._arrivals, list(request.prompt), max_tokens, guide=guide)
        if request.prompt_logprobs is not None:
            sequence.prompt_logprobs = [None]
        self._arrivals += 1
        self._sequences[request.request_id] = sequence
        self.waiting.append(sequence)
        return sequence

    def cancel(self, request_id: str) -> Outcome | None:
        """End a request and free its memory, at once or, if a planned step includes it, when that step ends.

        Returns what ended now; None also when there is no such request any more.
        """
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return None
        if self._is_planned(sequence):
            sequence.cancelled = True
            return None
        if sequence.status is Status.WAITING:
            self.waiting.remove(sequence)
        else:
            self.running.remove(sequence)
        return self._finish(sequence, "cancelled")

    def plan(self) -> StepPlan | None:
        """Choose the next step's work; None when there is nothing to do."""
        assert self.outstanding is None, "the last plan is not committed"
        if not self._sequences:
            return None
        self._growths = []
        decodes = self._plan_decodes()
        chunks = self._plan_chunks(self.config.max_step_tokens - len(decodes))
        num_tokens = len(decodes) + sum(chunk.end - chunk.start for chunk in chunks)
        assert num_tokens, "the earliest request always advances"
        self.outstanding = StepPlan(tuple(decodes), tuple(chunks), tuple(self._growths), num_tokens)
        return self.outstanding

    def commit(
        self, plan: StepPlan, tokens: list[int], ends: Mapping[Sequence, FinishReason] | None = None
    ) -> list[Outcome]:
        """Make a step final: `tokens` are what it chose, in the order that StepPlan gives.

        Sequences in `ends` end here, without a token, for the reason that stands there.
        """
        assert plan is self.outstanding, "only the plan under way can be committed"
        self.outstanding = None
        ends = ends or {}
        outcomes = []
        chosen = iter(tokens)
        for sequence in plan.decodes:
            sequence.length += 1
            outcomes.append(self._advance(sequence, next(chosen), ends.get(sequence)))
        for chunk in plan.chunks:
            self._commit_chunk(chunk)
            token = next(chosen) if chunk.samples else None
            if chunk.last or chunk.sequence.cancelled:
                outcomes.append(self._advance(chunk.sequence, token, ends.get(chunk.sequence)))
        self._forget_finished(outcomes)
        return outcomes

    def end_all(self, reason: FinishReason) -> list[Outcome]:
        """Drop the plan under way and end every request, in order of arrival."""
        self.outstanding = None
        outcomes = [self._finish(sequence, reason) for sequence in [*self.running, *self.waiting]]
        self.running.clear()
        self.waiting.clear()
        return outcomes

    def check(self, request: Request) -> int:
        """Return the number of tokens at which the answer is cut.

        Raises RequestRejected if the request could not be served even alone.
        """
        config, prompt = self.config, len(request.prompt)
        if request.request_id in self._sequences:
            raise RequestRejected(f"request id {request.request_id!r} is already being served")
        check_request(request, config.vocab_size)
        room = config.max_model_len - prompt
        if room < min(request.max_tokens, 1):
            raise RequestRejected(
                f"the prompt has {prompt} tokens, and the model's context of {config.max_model_len} leaves no room for "
                "an answer: shorten the prompt"
            )
        max_tokens = prompt + min(request.max_tokens, room)
        pages = pages_for(max(prompt, max_tokens - 1), config.page_size)
        if pages > config.num_pages:
            raise RequestRejected(
                f"prompt ({prompt} tokens) and answer (up to {max_tokens - prompt}) need {pages} pages of "
                f"{config.page_size} tokens, and the KV cache has {config.num_pages}: lower max_tokens or shorten the "
                "prompt"
            )
        return max_tokens

    def _plan_decodes(self) -> list[Sequence]:
        decodes: list[Sequence] = []
        page_size = self.config.page_size
        for sequence in list(self.running):
            if sequence.status is not Status.DECODE:
                continue  # prefilling, or preempted a moment ago
            if sequence.length == len(sequence.pages) * page_size and not self._grow(sequence):
                continue
            decodes.append(sequence)
        return decodes

    def _grow(self, sequence: Sequence) -> bool:
        """Give a sequence one more page, preempting the latest arrivals for it; False if that was itself."""
        while not self.pages.num_free:
            victim = self.running.pop()
            self._preempt(victim)
            if victim is sequence:
                return False
        page = self.pages.take(1)
        self._growths.append(PageGrowth(sequence.row, len(sequence.pages), page))
        sequence.pages += page
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.preemptions += 1
        self._release(sequence)
        sequence.status = Status.WAITING
        sequence.length = 0
        self.waiting.appendleft(sequence)

    def _plan_chunks(self, budget: int) -> list[Chunk]:
        chunks: list[Chunk] = []
        if budget == 0:
            return chunks
        logit_rows = self.config.max_prompt_logit_rows
        for sequence in self._prefilling():
            chunk = self._chunk(sequence, budget, logit_rows)
            if chunk is None:
                continue
            chunks.append(chunk)
            logit_rows -= len(sequence.prompt_positions(chunk.start, chunk.end))
            budget -= chunk.end - chunk.start
            if budget == 0:
                break
        return chunks

    def _prefilling(self) -> Iterator[Sequence]:
        """The sequences that prefill, in order of arrival; admits from the queue as far as the caller goes on."""
        yield from [sequence for sequence in self.running if sequence.status is Status.PREFILL]
        while self.waiting and self._can_admit(self.waiting[0]):
            yield self._admit()

    def _chunk(self, sequence: Sequence, budget: int, logit_rows: int) -> Chunk | None:
        start, target = sequence.length, len(sequence.tokens)
        end = min(target, start + budget)
        wanted = sequence.prompt_positions(start, end)
        if len(wanted) > logit_rows:
            end = wanted[logit_rows]
        if end == start:
            return None
        last = end == target
        return Chunk(sequence, start, end, last, samples=last and len(sequence.tokens) < sequence.max_tokens)

    def _can_admit(self, sequence: Sequence) -> bool:
        headroom = len(self.running)
        needed = pages_for(len(sequence.tokens), self.config.page_size) + headroom
        return bool(self._rows) and self.slots.can_prefill and needed <= self.pages.num_free

    def _admit(self) -> Sequence:
        """Give the head of the queue all that its prefill needs."""
        sequence = self.waiting.popleft()
        sequence.status = Status.PREFILL
        sequence.row = self._rows.pop()
        sequence.slot = self.slots.take()
        sequence.spare = self.slots.take()
        sequence.pages = self.pages.take(pages_for(len(sequence.tokens), self.config.page_size))
        self._growths.append(PageGrowth(sequence.row, 0, sequence.pages.copy()))
        self.running.append(sequence)
        return sequence

    def _commit_chunk(self, chunk: Chunk) -> None:
        sequence = chunk.sequence
        sequence.length = chunk.end
        sequence.slot, sequence.spare = sequence.spare, sequence.slot
        if chunk.last:
            self.slots.give_back(sequence.spare)
            sequence.spare = NOTHING
            sequence.status = Status.DECODE

    def _advance(self, sequence: Sequence, token: int | None, end: FinishReason | None) -> Outcome:
        """Append the token that a committed step chose, and end the sequence where a rule says so."""
        if sequence.cancelled:
            return self._finish(sequence, "cancelled")
        if end is not None:
            return self._finish(sequence, end)
        if token is None:
            return self._finish(sequence, "length")
        if token in sequence.request.stop_ids:
            return self._finish(sequence, "stop", stop_id=token)
        sequence.tokens.append(token)
        if len(sequence.tokens) >= sequence.max_tokens:
            return self._finish(sequence, "length", (token,))
        return Outcome(sequence, (token,))

    def _finish(
        self, sequence: Sequence, reason: FinishReason, token_ids: tuple[int, ...] = (), stop_id: int | None = None
    ) -> Outcome:
        if sequence.status is not Status.WAITING:
            self._release(sequence)
        sequence.status = Status.FINISHED
        del self._sequences[sequence.request.request_id]
        return Outcome(sequence, token_ids, reason, stop_id)

    def _release(self, sequence: Sequence) -> None:
        """Return all the memory that an admitted sequence holds."""
        self.pages.give_back(sequence.pages)
        self.slots.give_back(sequence.slot)
        if sequence.spare != NOTHING:
            self.slots.give_back(sequence.spare)
        self._rows.append(sequence.row)
        sequence.pages = []
        sequence.slot = sequence.spare = sequence.row = NOTHING

    def _forget_finished(self, outcomes: list[Outcome]) -> None:
        if any(outcome.finish_reason for outcome in outcomes):
            self.running = [sequence for sequence in self.running if sequence.status is not Status.FINISHED]

    def _is_planned(self, sequence: Sequence) -> bool:
        plan = self.outstanding
        if plan is None:
            return False
        return any(sequence is other for other in plan.decodes) or any(sequence is c.sequence for c in plan.chunks)
