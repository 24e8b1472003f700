"""Decides what each step computes. Plain Python: no tensors, no clock, no I/O.

The rules, in order:

1. Every decoding sequence gets its token. One that needs a page when none is free takes it from the latest arrival
   (perhaps itself), which goes back to the queue and computes its tokens again later.
2. Prefills fill what is left of the token budget, in order of arrival.
3. Drafts take what is left of the budget, and pages that are free; those go back with the step.
4. The queue is admitted strictly in order of arrival, when a page table, two slots and all pages of the prefill are
   free, plus one page of headroom for each running sequence so that admission does not cause a preemption at once.

Arrival is that at the ingress: an answer that another worker has begun keeps its place among those of this one. It may
be older than what runs when it comes; that goes on, and nothing is admitted before it. So the earliest of those that
run always advances, and none starves (tests/sim/ledger.py has the bound and its proof).

A step is planned, run as often as it takes, and committed. What planning changes (admission, pages, preemption) stands
on its own: pages taken for a step that aborts stay with their sequences and serve the replay.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from operator import attrgetter

from pydantic import BaseModel, ConfigDict, Field, model_validator

from divisi.cluster.drafting import Company, DraftPolicy, FixedDepth
from divisi.cluster.engine.draft_counts import DraftCounts
from divisi.cluster.engine.grammar import Guide
from divisi.cluster.engine.memory.sequence_memory import SLOTS_TO_PREFILL, Memory, pages_for
from divisi.cluster.engine.request_check import check_request
from divisi.cluster.engine.sequence import Sequence, Status
from divisi.cluster.engine.step.plan import NEVER, NO_OPS, Cuts, Outcome, PlanLayout, Run, RunKind, StepPlan
from divisi.cluster.engine.suspects import Suspects
from divisi.cluster.errors import RequestRejected
from divisi.cluster.request import EndReason, Request

_BY_ARRIVAL = attrgetter("arrival")


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
    max_draft_tokens: int = Field(default=0, ge=0, description="Drafts of one sequence in a step.")
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

    def __init__(self, config: SchedulerConfig, drafting: DraftPolicy | None = None, cuts: Cuts = NEVER) -> None:
        """`drafting` decides how far drafts go within the limits; without one, all the way."""
        self.config = config
        self._cuts = self._all_cuts = cuts
        self._drafting = drafting or FixedDepth()
        self.memory = Memory(
            num_pages=config.num_pages,
            page_size=config.page_size,
            num_slots=config.num_slots,
            num_tables=config.max_seqs,
        )
        self.elsewhere = 0
        """Sequences of other workers that decode without drafts, and wait for those of this one."""
        self.preemptions = 0
        self.drafts = DraftCounts()
        self.running: list[Sequence] = []
        """In order of arrival."""
        self.waiting: deque[Sequence] = deque()
        """In order of arrival."""
        self.outstanding: StepPlan | None = None
        self._suspects = Suspects()
        self._only: list[Sequence] | None = None
        """Whom the step that is being planned is about; None: everybody."""
        self._max_rows = config.max_step_tokens
        self._ops_left = NO_OPS
        """Of a plan that was given up."""
        self._sequences: dict[str, Sequence] = {}
        self._arrivals = 0

    def submit(self, request: Request, guide: Guide | None = None) -> Sequence:
        """Queue a request; `guide` belongs to its grammar. Raises RequestRejected, see `check`."""
        max_length = self.check(request)
        arrival = request.arrived, self._arrivals
        sequence = Sequence(request, arrival, [*request.prompt, *request.answered], max_length, guide=guide)
        if request.prompt_logprobs is not None:
            sequence.prompt_logprobs = [None]
        self._arrivals += 1
        self._sequences[request.request_id] = sequence
        insort(self.waiting, sequence, key=_BY_ARRIVAL)
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
        while not (layout := self._lay_out()).num_sequences and self._only is not None:
            self._suspects.clear()  # it was preempted meanwhile
        ops = self._ops_left._replace(page_copies=self._ops_left.page_copies + self.memory.take_copies())
        self._ops_left = NO_OPS
        self.outstanding = layout.plan(self.memory.take_growths(), ops, self._cuts, alone=self._only is not None)
        assert self.outstanding.num_rows, "the earliest request always advances"
        return self.outstanding

    def resize(self, max_rows: int, *, crowded: bool = False) -> list[Outcome] | None:
        """Plan with so many rows a step from now on, at most as many as configured; `crowded`: see `Cuts`.

        A larger plan that is under way is given up: nothing of it counts, and the next one takes its place. Returns
        the requests that were cancelled meanwhile and end with it; None where no plan was given up.
        """
        assert self.config.max_seqs <= max_rows <= self.config.max_step_tokens, "a share that there are no buffers for"
        self._max_rows, self._cuts = max_rows, self._all_cuts.where(crowded=crowded)
        plan = self.outstanding
        if plan is None or plan.num_rows <= max_rows:
            return None
        return self._give_up(plan)

    def strike(self) -> list[Outcome] | None:
        """The step under way has lost a rank inside a layer, or was out of time there.

        Returns None where its plan is to be run again as it is; else it is given up, as by `resize`, and the next one
        is about some of its requests only. One that failed alone again and again is among the outcomes, as lost.
        """
        plan = self.outstanding
        assert plan is not None, "no step is under way"
        anew, failed = self._suspects.strike([run.sequence for run in plan.runs])
        if not anew:
            return None
        outcomes = self._give_up(plan)
        if failed is not None and failed.status is not Status.FINISHED:
            outcomes.append(self._finish(failed, "lost"))
            self._forget_finished(outcomes)
        return outcomes

    def _give_up(self, plan: StepPlan) -> list[Outcome]:
        """Nothing of a plan counts, and another one takes its place."""
        self.outstanding, self._ops_left = None, plan.ops
        for run in plan.drafting:
            self.memory.trim(run.sequence.holding, run.start + 1)
        outcomes = [self._finish(run.sequence, "cancelled") for run in plan.runs if run.sequence.cancelled]
        self._forget_finished(outcomes)
        return outcomes

    def commit(
        self, plan: StepPlan, tokens: Seq[Seq[int]], ends: Mapping[Sequence, EndReason] | None = None
    ) -> list[Outcome]:
        """Make a step final. `tokens` holds what each of `plan.runs` chose: nothing, one, or several of a ring run.

        Of a ring run's rows as many count as it chose tokens. Sequences in `ends` end here, after their tokens, for the
        reason that stands there.
        """
        assert plan is self.outstanding, "only the plan under way can be committed"
        self.outstanding = None
        self._suspects.clear()
        ends = ends or {}
        outcomes = []
        for run, chosen in zip(plan.runs, tokens, strict=True):
            sequence = run.sequence
            if run.kind is RunKind.RING:
                assert len(chosen) <= run.num_rows, "a row chooses one token"
                self._commit_ring(run, len(chosen))
            else:
                self._commit_scan(run)
            if run.completes or sequence.cancelled:
                outcomes.append(self._advance(sequence, chosen, ends.get(sequence), run.chooses))
        self._forget_finished(outcomes)
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
        max_length = prompt + min(request.max_tokens, room)
        pages = pages_for(max(prompt, max_length - 1), config.page_size)
        if pages > config.num_pages:
            raise RequestRejected(
                f"prompt ({prompt} tokens) and answer (up to {max_length - prompt}) need {pages} pages of "
                f"{config.page_size} tokens, and the KV cache has {config.num_pages}: lower max_tokens or shorten the "
                "prompt"
            )
        return max_length

    def _lay_out(self) -> PlanLayout:
        """Who takes part in the next step, and with which rows."""
        self._only = self._suspects.group(self.running)
        layout = PlanLayout(self._max_rows, self.config.max_prompt_logit_rows)
        self._plan_decodes(layout)
        self._plan_prefills(layout)
        self._plan_drafts(layout)
        return layout

    def _plan_decodes(self, layout: PlanLayout) -> None:
        page_size = self.config.page_size
        for sequence in self._only or list(self.running):
            if sequence.status is not Status.DECODE:
                continue  # prefilling, or preempted a moment ago
            if sequence.length == len(sequence.holding.pages) * page_size and not self._grow(sequence):
                continue
            layout.add_ring(sequence)

    def _plan_drafts(self, layout: PlanLayout) -> None:
        """Drafts take the rows and the free pages that nobody else wants in this step."""
        if not self.config.max_draft_tokens:
            return
        decoding, context = [], 0
        for sequence in layout.decoding:
            sequence.drafter.limit, sequence.drafter.context = self._most_drafts(sequence), sequence.length
            if sequence.drafter.limit > 0:
                decoding.append(sequence)
            else:
                context += sequence.length
        if not decoding:
            return
        prefill_rows = self._max_rows - layout.rows_left - len(layout.decoding)
        company = Company(len(layout.decoding) - len(decoding), prefill_rows, self.elsewhere, context)
        depths = self._drafting.depths([sequence.drafter for sequence in decoding], company)
        for sequence, depth in zip(decoding, depths, strict=True):
            count = min(depth, layout.rows_left)
            while (room := self._room(sequence)) < count and self.memory.grow(sequence.holding):
                pass
            if (count := min(count, room)) > 0:
                layout.add_drafts(sequence, count)

    def _most_drafts(self, sequence: Sequence) -> int:
        """The limits of the gang, the request and its span, and one less than the tokens that it may still get."""
        span = sequence.triggers.inside
        wanted = (sequence.request.max_draft_tokens, None if span is None else span.max_draft_tokens)
        limits = [limit for limit in wanted if limit is not None]
        return min(self.config.max_draft_tokens, *limits, sequence.max_length - len(sequence.tokens) - 1)

    def _room(self, sequence: Sequence) -> int:
        """Tokens past the next one that its pages hold."""
        return len(sequence.holding.pages) * self.config.page_size - sequence.length - 1

    def _grow(self, sequence: Sequence) -> bool:
        """Give a sequence one more page, preempting the latest arrivals for it; False if that was itself."""
        while not self.memory.grow(sequence.holding):
            victim = self.running.pop()
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.preemptions += 1
        self._release(sequence)
        sequence.status = Status.WAITING
        sequence.length = 0
        insort(self.waiting, sequence, key=_BY_ARRIVAL)

    def _plan_prefills(self, layout: PlanLayout) -> None:
        if not layout.rows_left:
            return
        for sequence in self._prefilling():
            end = self._prefill_end(sequence, layout)
            if end > sequence.length:
                layout.add_scan(sequence, end)
            if not layout.rows_left:
                break

    def _prefilling(self) -> Iterator[Sequence]:
        """The sequences that prefill, in order of arrival; admits from the queue as far as the caller goes on."""
        yield from [sequence for sequence in self._only or self.running if sequence.status is Status.PREFILL]
        if self._only is not None:
            return
        while self.waiting and self.memory.can_acquire(len(self.waiting[0].tokens), headroom=len(self.running)):
            yield self._admit()

    def _prefill_end(self, sequence: Sequence, layout: PlanLayout) -> int:
        """How far a sequence's prefill gets in this step."""
        start = sequence.length
        end = min(len(sequence.tokens), start + layout.rows_left)
        wanted = sequence.prompt_positions(start, end)
        return wanted[layout.prompt_logits_left] if len(wanted) > layout.prompt_logits_left else end

    def _admit(self) -> Sequence:
        """Give the head of the queue all that its prefill needs."""
        sequence = self.waiting.popleft()
        sequence.status = Status.PREFILL
        sequence.admitted = self.memory.acquire(len(sequence.tokens))
        insort(self.running, sequence, key=_BY_ARRIVAL)
        return sequence

    def _commit_ring(self, run: Run, num_chosen: int) -> None:
        """Rows count up to the last that chose; pages that only the others needed go back."""
        sequence = run.sequence
        sequence.length = run.start + max(num_chosen, 1)
        accepted = max(num_chosen - 1, 0)
        self._drafting.note(sequence.drafter, run.num_drafts, accepted)
        if run.num_drafts:
            sequence.drafted += run.num_drafts
            sequence.accepted += accepted
            span = sequence.triggers.inside
            in_call = span is not None and span.max_draft_tokens is not None
            self.drafts.note("tools" if in_call else "chat", run.num_drafts, accepted)
            self.memory.trim(sequence.holding, sequence.length)

    def _commit_scan(self, run: Run) -> None:
        sequence = run.sequence
        sequence.length = run.end
        self.memory.settle(sequence.holding, run.leaves[-1].slot)
        if run.completes:
            self.memory.end_prefill(sequence.holding)
            sequence.status = Status.DECODE

    def _advance(self, sequence: Sequence, tokens: Seq[int], end: EndReason | None, chooses: bool) -> Outcome:
        """Append the tokens that a committed run chose, and end the sequence where a rule says so."""
        if sequence.cancelled:
            return self._finish(sequence, "cancelled")
        told: list[int] = []
        for token in tokens:
            if sequence.stops_at(token):
                return self._finish(sequence, "stop", told, stop_id=token)
            sequence.tokens.append(token)
            told.append(token)
            if len(sequence.tokens) >= sequence.max_length:
                return self._finish(sequence, "length", told)
        if end is not None or not chooses:
            return self._finish(sequence, end or "length", told)
        return Outcome(sequence, tuple(told))

    def _finish(
        self, sequence: Sequence, reason: EndReason, token_ids: Seq[int] = (), stop_id: int | None = None
    ) -> Outcome:
        if sequence.status is not Status.WAITING:
            self._release(sequence)
        sequence.status = Status.FINISHED
        del self._sequences[sequence.request.request_id]
        return Outcome(sequence, tuple(token_ids), reason, stop_id)

    def _release(self, sequence: Sequence) -> None:
        """Return all the memory that an admitted sequence holds."""
        self.memory.release(sequence.holding)
        sequence.admitted = None

    def _forget_finished(self, outcomes: list[Outcome]) -> None:
        if any(outcome.finish_reason for outcome in outcomes):
            self.running = [sequence for sequence in self.running if sequence.status is not Status.FINISHED]

    def _is_planned(self, sequence: Sequence) -> bool:
        plan = self.outstanding
        if plan is None:
            return False
        return any(sequence is run.sequence for run in plan.runs)
