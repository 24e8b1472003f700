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
from divisi.cluster.engine.step.plan import Run, StepPlan
from divisi.cluster.request import EndReason, TokenLogprob
from divisi.kernels.sampling.layout import Draws
from divisi.model.sampling.logit_rules import SequenceRules
from divisi.model.sampling.sampler import (
    NO_TOKEN,
    Logprobs,
    Sampled,
    Sampler,
    SamplingBatch,
    SequenceSampling,
    token_logprobs,
)
from divisi.model.sampling.token_counts import History


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
        self._sampled: list[tuple[Sequence, int]] = []
        self._batch = SamplingBatch(())
        self._draft_batches: dict[int, tuple[list[Sequence], SamplingBatch]] = {}
        self._masks = StepMasks(None)
        self._chosen: list[list[int]] = []

    def start(self, plan: StepPlan) -> None:
        """A step begins, perhaps once more."""
        runs = plan.choosing
        sampled = [(run.sequence, 1 + run.num_drafts) for run in runs]
        if sampled and sampled != self._sampled:
            sequences = [_sequence_sampling(run.sequence) for run in runs]
            owners = [owner for owner, (_, rows) in enumerate(sampled) for _ in range(rows)]
            self._sampled = sampled
            self._batch = SamplingBatch(sequences, self._batch, self._device, owners)
        self._masks = StepMasks(self._grammars)

    def ask(self, rows: Seq[Row], drafts: Drafts) -> None:
        """Begin what can be done while the rows are computed: masks by the requests' grammars."""
        self._masks.ask(rows, drafts)

    def draft(self, rows: list[Row], logits_SV: Tensor, drafts: Drafts) -> Tensor:
        """Choose one more draft for each of the rows' runs, int64 [S]; NO_TOKEN where its rules leave none."""
        batch = self._draft_batch(rows)
        return self._sample(rows, batch, logits_SV, drafts).token_ids_R

    def draws(self, runs: Seq[Run]) -> Draws | None:
        """How the drafts of some runs are drawn, one row each; None where rules or a grammar have a say in that."""
        batch = self._draft_batch([Row(run, 0) for run in runs])
        return batch.free if batch.rules is None else None

    def drafted(self, runs: Seq[Run], passes: list[list[int]]) -> list[list[int]]:
        """The drafts of some runs that were drawn at once, as the sampler has them."""
        rows = [Row(run, 0) for run in runs]
        return self._sampler.drawn(passes, self._draft_batch(rows), [row.position for row in rows])

    def choose(self, plan: StepPlan, logits_RV: Tensor, drafts: Drafts) -> Choice:
        """Sample the next tokens of each run that chooses any. The step may still be given up after this."""
        choosing = plan.choosing
        self._chosen = []
        if not choosing:
            return Choice([[] for _ in plan.runs])
        rows = rows_of(choosing)
        if len(rows) != logits_RV.shape[0]:
            logits_RV = logits_RV[[row for run in choosing for row in run.choosing_rows]]
        found = self._sample(rows, self._batch, logits_RV, drafts)
        proposed = iter(found.token_ids_R.tolist())
        self._chosen = [_stands(run, [next(proposed) for _ in run.choosing_rows], drafts.of(run)) for run in choosing]
        stuck = [run.sequence for run, tokens in zip(choosing, self._chosen, strict=True) if not tokens]
        ends = {sequence: _how_stuck(sequence) for sequence in stuck}
        failed = {sequence: _why_stuck(sequence) for sequence in stuck if ends[sequence] != "stop"}
        by_row = {run.row: tokens for run, tokens in zip(choosing, self._chosen, strict=True)}
        by_run = [by_row.get(run.row, []) for run in plan.runs]
        return Choice(by_run, self._told(rows, found), ends, failed)

    def commit(self) -> None:
        """Count the tokens of a step that is final: those chosen last."""
        if self._batch.rules is None:
            return
        for place in range(max(map(len, self._chosen), default=0)):
            column = [tokens[place] if place < len(tokens) else NO_TOKEN for tokens in self._chosen]
            self._batch.add(torch.tensor(column, device=self._device))

    def _sample(self, rows: list[Row], batch: SamplingBatch, logits_RV: Tensor, drafts: Drafts) -> Sampled:
        positions_R = np.array([row.position for row in rows])
        masks = self._masks.of([rows[index] for index in batch.masked_rows])
        ahead_RA = None if batch.rules is None else drafts.ahead(rows)
        if ahead_RA is not None:
            ahead_RA = ahead_RA.to(self._device)
        return self._sampler.sample(logits_RV, batch, positions_R, masks, ahead_RA)

    def _draft_batch(self, rows: list[Row]) -> SamplingBatch:
        """Parameters of a draft pass, kept while they need no history: that is the step's own batch's to follow."""
        sequences = [row.run.sequence for row in rows]
        kept = self._draft_batches.get(len(rows))
        if kept is not None and kept[0] == sequences and kept[1].rules is None:
            return kept[1]
        parameters = [replace(_sequence_sampling(sequence), logprobs=None) for sequence in sequences]
        batch = SamplingBatch(parameters, self._batch, self._device)
        self._draft_batches[len(rows)] = sequences, batch
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


def _sequence_sampling(sequence: Sequence) -> SequenceSampling:
    sampling = sequence.request.sampling
    rules = _sequence_rules(sequence)
    return SequenceSampling(
        sampling.temperature,
        sampling.top_k,
        sampling.top_p,
        sampling.seed,
        logprobs=sequence.request.logprobs,
        min_p=sampling.min_p,
        rules=None if rules.is_empty else rules,
        history=History(sequence, sequence.tokens, len(sequence.request.prompt)),
    )


def _sequence_rules(sequence: Sequence) -> SequenceRules:
    request, sampling = sequence.request, sequence.request.sampling
    early = request.min_tokens > sequence.num_generated
    return SequenceRules(
        masked=request.grammar is not None,
        allowed_token_ids=sequence.allowed_ids,
        bad_words=sampling.bad_words,
        stop_ids=tuple(sorted(request.stop_ids | request.content_stop_ids)) if early else (),
        min_position=len(request.prompt) + request.min_tokens if early else 0,
        logit_bias=sampling.logit_bias,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
    )


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
