"""Chooses the tokens of a step, from the rows of its logits and what the requests ask for.

Shapes: R rows of logits, V vocabulary, L rows whose log-probabilities are asked for.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from divisi.cluster.engine.grammar import Grammars, Guided
from divisi.cluster.engine.plan import StepPlan
from divisi.cluster.engine.sequence import Sequence
from divisi.cluster.request import EndReason, TokenLogprob
from divisi.model.sampling.logit_rules import SequenceRules
from divisi.model.sampling.sampler import NO_TOKEN, Logprobs, Sampler, SamplingBatch, SequenceSampling, token_logprobs
from divisi.model.sampling.token_counts import History

Masks = Future[NDArray[np.int32]]


@dataclass(frozen=True, slots=True)
class Choice:
    """What each run of a step chose, and the log-probabilities asked for.

    Where a request's rules leave no token, its answer ends: `ends` says how, `failed` why if it isn't complete.
    """

    tokens: list[list[int]] = field(default_factory=list)
    """By run, in the order of the plan's."""
    logprobs: dict[Sequence, TokenLogprob] = field(default_factory=dict)
    ends: dict[Sequence, EndReason] = field(default_factory=dict)
    failed: dict[Sequence, str] = field(default_factory=dict)


class StepSampler:
    """Samples step after step, keeping the parameters as tensors for as long as the same sequences are sampled."""

    def __init__(self, sampler: Sampler, grammars: Grammars | None, device: torch.device) -> None:
        self._sampler = sampler
        self._grammars = grammars
        self._device = device
        self._sampled: list[Sequence] = []
        self._batch = SamplingBatch(())
        self._guided: list[Sequence] = []
        self._chosen_R: Tensor | None = None

    def start(self, plan: StepPlan) -> Masks | None:
        """Begin what can be done while the model runs: masks by the requests' grammars."""
        sampled = [run.sequence for run in plan.choosing]
        if sampled and sampled != self._sampled:
            rows = [_sequence_sampling(sequence) for sequence in sampled]
            self._sampled, self._batch = sampled, SamplingBatch(rows, self._batch, self._device)
            self._guided = [sampled[row] for row in self._batch.masked_rows]
        if not sampled or not self._guided:
            return None
        assert self._grammars is not None, "a request with a grammar was accepted"
        answers = []
        for sequence in self._guided:
            guide = sequence.guide
            assert guide is not None, "a request with a grammar has a guide"
            answers.append(Guided(guide, sequence.tokens, len(sequence.request.prompt)))
        return self._grammars.start(answers)

    def choose(self, plan: StepPlan, logits_RV: Tensor, masks: Masks | None) -> Choice:
        """Sample the next token of each run that chooses one. The step may still be given up after this."""
        choosing, sampled = plan.choosing, self._sampled
        if not choosing:
            return Choice([[] for _ in plan.runs])
        if len(sampled) != logits_RV.shape[0]:
            logits_RV = logits_RV[[run.chosen_row for run in choosing]]
        positions_R = np.array([len(sequence.tokens) for sequence in sampled])
        found = self._sampler.sample(logits_RV, self._batch, positions_R, masks.result() if masks else None)
        tokens: list[int] = found.token_ids_R.tolist()
        stuck: list[Sequence] = []
        if NO_TOKEN in tokens:
            stuck = [sequence for sequence, token in zip(sampled, tokens, strict=True) if token == NO_TOKEN]
        ends = {sequence: _how_stuck(sequence) for sequence in stuck}
        failed = {sequence: _why_stuck(sequence) for sequence in stuck if ends[sequence] != "stop"}
        self._chosen_R = found.token_ids_R
        chosen = {run.row: [] if run.sequence in ends else [token] for run, token in zip(choosing, tokens, strict=True)}
        by_run = [chosen.get(run.row, []) for run in plan.runs]
        if found.logprobs is None:
            return Choice(by_run, {}, ends, failed)
        rows = self._batch.logprob_rows
        asked = [sampled[row] for row in rows]
        limits = [sequence.request.logprobs or 0 for sequence in asked]
        told = _told(found.logprobs, [tokens[row] for row in rows], limits)
        return Choice(by_run, dict(zip(asked, told, strict=True)), ends, failed)

    def commit(self) -> None:
        """Count the tokens of a step that is final: those chosen last."""
        if self._chosen_R is not None:
            self._batch.add(self._chosen_R)
            self._chosen_R = None


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
