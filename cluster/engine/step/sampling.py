"""Chooses the tokens of a step, from the rows of its logits and what the requests ask for.

Shapes: R rows of logits, V vocabulary, L rows whose log-probabilities are asked for.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from divisi.cluster.engine.grammar import Grammars
from divisi.cluster.engine.sequence import Sequence
from divisi.cluster.engine.step.drafts import Drafts, Row, StepMasks
from divisi.cluster.engine.step.parameters import sequence_sampling
from divisi.cluster.engine.step.plan import Run, StepPlan
from divisi.cluster.request import EndReason, TokenLogprob
from divisi.kernels.sampling.layout import Draws
from divisi.model.sampling.sampler import (
    NO_TOKEN,
    Logprobs,
    Sampled,
    Sampler,
    SamplingBatch,
    token_logprobs,
)

_MOST_KEPT = 64
"""Parameters of steps."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What each run of a step chose, and the log-probabilities asked for.

    Where a request's rules leave no token, its answer ends: `ends` says how, `failed` why if it isn't complete.
    """

    tokens: list[list[int]] = field(default_factory=list)
    """By run, in the order of the plan's."""
    logprobs: dict[Sequence, list[TokenLogprob]] = field(default_factory=dict)
    """Of the tokens of a sequence's run."""
    ends: dict[Sequence, EndReason] = field(default_factory=dict)
    failed: dict[Sequence, str] = field(default_factory=dict)


class StepSampler:
    """Samples step after step, keeping the parameters as tensors for as long as the same sequences are sampled.

    A draft is chosen as the model's token in its place will be: by the same noise and rules, the drafts before it
    counting as history. It stands if and only if the two are equal (Daliri et al. 2024, arXiv 2408.07978): every token
    is the model's own choice.
    """

    def __init__(self, sampler: Sampler, grammars: Grammars | None, device: torch.device) -> None:
        self._sampler = sampler
        self._grammars = grammars
        self._device = device
        self._sampled: list[Sequence] = []
        self._batches: dict[tuple[int, ...], SamplingBatch] = {}
        """Of these, by the rows of each."""
        self._batch = SamplingBatch(())
        """Of the step under way."""
        self._draft_batches: dict[int, tuple[list[Sequence], SamplingBatch]] = {}
        self._masks = StepMasks(None)
        self._chosen: list[list[int]] = []

    def start(self, plan: StepPlan) -> None:
        """A step begins, perhaps once more."""
        if plan.choosing:
            self._batch = self._batch_of(plan.choosing)
        self._masks = StepMasks(self._grammars)

    def ask(self, rows: Seq[Row], drafts: Drafts) -> None:
        """Begin what can be done while the rows are computed: masks by the requests' grammars."""
        self._masks.ask(rows, drafts)

    def ask_all(self, runs: Seq[Run], drafts: Drafts) -> None:
        """The same of all rows of some runs, which are the step's."""
        if self._batch.rules is not None:
            self._masks.ask(rows_of(runs), drafts)

    def draft(self, rows: list[Row], logits_SV: Tensor, drafts: Drafts) -> Tensor:
        """Choose one more draft for each of the rows' runs, int64 [S]; NO_TOKEN where its rules leave none."""
        batch = self._draft_batch([row.run.sequence for row in rows])
        return self._sample(rows, [row.position for row in rows], batch, logits_SV, drafts).token_ids_R

    def draws(self, runs: Seq[Run]) -> Draws | None:
        """How the drafts of some runs are drawn, one row each; None where rules or a grammar have a say in that."""
        batch = self._draft_batch([run.sequence for run in runs])
        return batch.free if batch.rules is None else None

    def drafted(self, runs: Seq[Run], passes: list[list[int]]) -> list[list[int]]:
        """The drafts of some runs that were drawn at once, as the sampler has them."""
        batch = self._draft_batch([run.sequence for run in runs])
        return self._sampler.drawn(passes, batch, [run.chosen_positions[0] for run in runs])

    def choose(self, plan: StepPlan, logits_RV: Tensor, drafts: Drafts) -> Choice:
        """Sample the next tokens of each run that chooses any. The step may still be given up after this."""
        choosing = plan.choosing
        self._chosen = []
        if not choosing:
            return Choice([[] for _ in plan.runs])
        batch = self._batch
        rows = [] if batch.rules is None and not batch.logprob_rows else rows_of(choosing)
        if batch.size != logits_RV.shape[0]:
            logits_RV = logits_RV[[row for run in choosing for row in run.choosing_rows]]
        positions = [position for run in choosing for position in run.chosen_positions]
        found = self._sample(rows, positions, batch, logits_RV, drafts)
        return self._choice(plan, found.token_ids_R.tolist(), drafts, self._told(rows, found))

    def draws_of_all(self) -> Draws | None:
        """How the step's rows are drawn from; None where there is more to it than the tokens."""
        batch = self._batch
        return batch.free if batch.size and batch.rules is None and not batch.logprob_rows else None

    def take(self, plan: StepPlan, drawn: list[int], drafts: Drafts) -> Choice:
        """The same as `choose`, of the tokens that its rows were drawn with by `draws_of_all`."""
        positions = [position for run in plan.choosing for position in run.chosen_positions]
        (token_ids,) = self._sampler.drawn([drawn], self._batch, positions)
        return self._choice(plan, token_ids, drafts, {})

    def _choice(
        self, plan: StepPlan, token_ids: list[int], drafts: Drafts, told: dict[Sequence, list[TokenLogprob]]
    ) -> Choice:
        """`token_ids` of all rows that choose."""
        choosing, at = plan.choosing, 0
        self._chosen = []
        for run in choosing:
            end = at + 1 + run.num_drafts
            self._chosen.append(_stands(run, token_ids[at:end], drafts.of(run)))
            at = end
        chosen = zip(choosing, self._chosen, strict=True)
        stuck = [] if all(self._chosen) else [run.sequence for run, tokens in chosen if not tokens]
        ends = {sequence: _how_stuck(sequence) for sequence in stuck}
        failed = {sequence: _why_stuck(sequence) for sequence in stuck if ends[sequence] != "stop"}
        by_run = self._chosen
        if plan.scans:
            by_row = {run.row: tokens for run, tokens in zip(choosing, self._chosen, strict=True)}
            by_run = [by_row.get(run.row, []) for run in plan.runs]
        return Choice(by_run, told, ends, failed)

    def commit(self) -> None:
        """Count the tokens of a step that is final: those chosen last."""
        if self._batch.rules is None:
            return
        for place in range(max(map(len, self._chosen), default=0)):
            column = [tokens[place] if place < len(tokens) else NO_TOKEN for tokens in self._chosen]
            self._batch.add(torch.tensor(column, device=self._device))

    def _sample(
        self, rows: list[Row], positions: list[int], batch: SamplingBatch, logits_RV: Tensor, drafts: Drafts
    ) -> Sampled:
        """`rows` are looked at where there are rules."""
        positions_R = np.array(positions)
        if batch.rules is None:
            return self._sampler.sample(logits_RV, batch, positions_R)
        masks = self._masks.of([rows[index] for index in batch.masked_rows])
        ahead_RA = drafts.ahead(rows)
        if ahead_RA is not None:
            ahead_RA = ahead_RA.to(self._device)
        return self._sampler.sample(logits_RV, batch, positions_R, masks, ahead_RA)

    def _batch_of(self, runs: Seq[Run]) -> SamplingBatch:
        """Parameters of the step's rows: those of a step with the same sequences and drafts, if no rule tells them
        apart, or new ones.
        """
        sequences, rows = [run.sequence for run in runs], tuple([1 + run.num_drafts for run in runs])
        if sequences != self._sampled or len(self._batches) > _MOST_KEPT:
            self._sampled, self._batches = sequences, {}
        elif (known := self._batches.get(rows)) is not None and (known is self._batch or known.rules is None):
            return known
        owners = [owner for owner, count in enumerate(rows) for _ in range(count)]
        batch = SamplingBatch([sequence_sampling(each) for each in sequences], self._batch, self._device, owners)
        self._batches[rows] = batch
        return batch

    def _draft_batch(self, sequences: list[Sequence]) -> SamplingBatch:
        """Parameters of a draft pass, kept while they need no history: that is the step's own batch's to follow."""
        kept = self._draft_batches.get(len(sequences))
        if kept is not None and kept[0] == sequences and kept[1].rules is None:
            return kept[1]
        parameters = [replace(sequence_sampling(sequence), logprobs=None) for sequence in sequences]
        batch = SamplingBatch(parameters, self._batch, self._device)
        self._draft_batches[len(sequences)] = sequences, batch
        return batch

    def _told(self, rows: list[Row], found: Sampled) -> dict[Sequence, list[TokenLogprob]]:
        """The log-probabilities asked for, of tokens that were chosen."""
        if found.logprobs is None:
            return {}
        asked = [rows[index].run.sequence for index in self._batch.logprob_rows]
        token_ids = found.token_ids_R[self._batch.logprob_rows].tolist()
        told: dict[Sequence, list[TokenLogprob]] = {}
        limits = [sequence.request.logprobs or 0 for sequence in asked]
        for sequence, entry in zip(asked, _told(found.logprobs, token_ids, limits), strict=True):
            told.setdefault(sequence, []).append(entry)
        return told


def rows_of(runs: Iterable[Run]) -> list[Row]:
    """The rows that choose tokens, of runs that do."""
    return [Row(run, ahead) for run in runs for ahead in range(1 + run.num_drafts)]


def _stands(run: Run, tokens: list[int], drafts: list[int]) -> list[int]:
    """Of the model's choices at a run's rows those that follow from drafts that stand; nothing comes after a stop.

    A row after drafts that is left without a token is none yet: it comes first in the next step.
    """
    chosen: list[int] = []
    for token, draft in zip(tokens, [*drafts, NO_TOKEN], strict=True):
        if token == NO_TOKEN:
            break
        chosen.append(token)
        if token != draft or token in run.sequence.request.stop_ids:
            break
    return chosen


def tell_prompt(plan: StepPlan, logits_RV: Tensor) -> dict[Sequence, list[TokenLogprob]]:
    """The log-probabilities of the prompt tokens that a step's prefills tell."""
    told = {}
    for run in plan.scans:
        sequence, positions = run.sequence, run.prompt_positions
        if positions:
            num_top = sequence.request.prompt_logprobs or 0
            targets = sequence.tokens[positions[0] + 1 : positions[-1] + 2]
            targets_L = torch.tensor(targets, device=logits_RV.device)
            found = token_logprobs(logits_RV[run.logit_row : run.logit_row + len(targets)], targets_L, num_top)
            told[sequence] = _told(found, targets, [num_top] * len(targets))
    return told


def _how_stuck(sequence: Sequence) -> EndReason:
    """How an answer ends that has no next token: complete, for a failure, or by what its request asks for."""
    guide = sequence.guide
    if guide is None:
        return "rejected"
    return "stop" if guide.is_complete else "rejected" if guide.error is None else guide.ends


def _why_stuck(sequence: Sequence) -> str:
    if sequence.guide is not None and sequence.guide.error is not None:
        return f"the answer's grammar cannot be followed any further: {sequence.guide.error}"
    return (
        f"no token is left to choose after {sequence.num_generated} tokens: allowed_token_ids, bad_words, logit_bias, "
        "min_tokens and the grammar exclude all of them; relax one"
    )


def _told(logprobs: Logprobs, token_ids: Seq[int], limits: Seq[int]) -> list[TokenLogprob]:
    """Make the records of L rows, each with as many alternatives as its request asks for."""
    chosen: list[float] = logprobs.chosen_L.tolist()
    top_ids: list[list[int]] = logprobs.top_ids_LN.tolist()
    top: list[list[float]] = logprobs.top_LN.tolist()
    return [
        TokenLogprob(token_id, value, tuple(zip(ids[:limit], values[:limit], strict=True)))
        for token_id, value, ids, values, limit in zip(token_ids, chosen, top_ids, top, limits, strict=True)
    ]
