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

from divisi.cluster.grammar import Answer, Grammars
from divisi.cluster.plan import StepPlan
from divisi.cluster.request import FinishReason, TokenLogprob
from divisi.cluster.sequence import Sequence
from divisi.model.logit_rules import RowRules
from divisi.model.sampling import NO_TOKEN, Logprobs, RowSampling, Sampler, SamplingBatch, token_logprobs
from divisi.model.token_counts import History

Masks = Future[NDArray[np.int32]]


@dataclass(frozen=True, slots=True)
class Choice:
    """A step's tokens, in the order that StepPlan gives, and the log-probabilities asked for.

    Where a request's rules leave no token, its answer ends: `ends` says how, `failed` why if it isn't complete.
    """

    tokens: list[int] = field(default_factory=list)
    logprobs: dict[Sequence, TokenLogprob] = field(default_factory=dict)
    ends: dict[Sequence, FinishReason] = field(default_factory=dict)
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

    def start(self, plan: StepPlan) -> Masks | None:
        """Begin what can be done while the model runs: masks by the requests' grammars."""
        sampled = [*plan.decodes, *(chunk.sequence for chunk in plan.chunks if chunk.samples)]
        if sampled and sampled != self._sampled:
            rows = [_row_sampling(sequence) for sequence in sampled]
            self._sampled, self._batch = sampled, SamplingBatch(rows, self._batch, self._device)
            self._guided = [sampled[row] for row in self._batch.masked_rows]
        if not sampled or not self._guided:
            return None
        assert self._grammars is not None, "a request with a grammar was accepted"
        answers = []
        for sequence in self._guided:
            guide = sequence.guide
            assert guide is not None, "a request with a grammar has a guide"
            answers.append(Answer(guide, sequence.tokens, len(sequence.request.prompt)))
        return self._grammars.start(answers)

    def choose(self, plan: StepPlan, logits_RV: Tensor, masks: Masks | None) -> Choice:
        """Sample a token for each decode and each chunk that samples. The step may still be given up after this."""
        sampled = self._sampled
        if not plan.decodes and not any(chunk.samples for chunk in plan.chunks):
            return Choice()
        if len(sampled) != logits_RV.shape[0]:
            logits_RV = logits_RV[_sample_rows(plan)]
        positions_R = np.array([len(sequence.tokens) for sequence in sampled])
        found = self._sampler.sample(logits_RV, self._batch, positions_R, masks.result() if masks else None)
        tokens: list[int] = found.token_ids_R.tolist()
        stuck: list[Sequence] = []
        if NO_TOKEN in tokens:
            stuck = [sequence for sequence, token in zip(sampled, tokens, strict=True) if token == NO_TOKEN]
        ends = {sequence: _how_stuck(sequence) for sequence in stuck}
        failed = {sequence: _why_stuck(sequence) for sequence in stuck if ends[sequence] != "stop"}
        if found.logprobs is None:
            return Choice(tokens, {}, ends, failed)
        rows = self._batch.logprob_rows
        asked = [sampled[row] for row in rows]
        limits = [sequence.request.logprobs or 0 for sequence in asked]
        told = _told(found.logprobs, [tokens[row] for row in rows], limits)
        return Choice(tokens, dict(zip(asked, told, strict=True)), ends, failed)

    def commit(self, choice: Choice) -> None:
        """Count the tokens of a step that is final."""
        if choice.tokens and self._batch.rules is not None:
            self._batch.add(torch.tensor(choice.tokens, device=self._device))


def tell_prompt(plan: StepPlan, logits_RV: Tensor) -> dict[Sequence, list[TokenLogprob]]:
    """The log-probabilities of the prompt tokens that a step's chunks tell."""
    told = {}
    row = len(plan.decodes)
    for chunk in plan.chunks:
        sequence = chunk.sequence
        positions = sequence.prompt_positions(chunk.start, chunk.end)
        if positions:
            num_top = sequence.request.prompt_logprobs or 0
            targets = sequence.tokens[positions.start + 1 : positions.stop + 1]
            targets_L = torch.tensor(targets, device=logits_RV.device)
            found = token_logprobs(logits_RV[row : row + len(positions)], targets_L, num_top)
            told[sequence] = _told(found, targets, [num_top] * len(targets))
        row += len(chunk.logit_positions())
    return told


def _row_sampling(sequence: Sequence) -> RowSampling:
    sampling = sequence.request.sampling
    rules = _row_rules(sequence)
    return RowSampling(
        sampling.temperature,
        sampling.top_k,
        sampling.top_p,
        sampling.seed,
        logprobs=sequence.request.logprobs,
        min_p=sampling.min_p,
        rules=None if rules.is_empty else rules,
        history=History(sequence, sequence.tokens, len(sequence.request.prompt)),
    )


def _row_rules(sequence: Sequence) -> RowRules:
    request, sampling = sequence.request, sequence.request.sampling
    early = request.min_tokens > sequence.num_generated
    return RowRules(
        masked=request.grammar is not None,
        allowed_token_ids=sequence.allowed_ids,
        bad_words=sampling.bad_words,
        stop_ids=tuple(sorted(request.stop_ids)) if early else (),
        min_position=len(request.prompt) + request.min_tokens if early else 0,
        logit_bias=sampling.logit_bias,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
    )


def _how_stuck(sequence: Sequence) -> FinishReason:
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


def _sample_rows(plan: StepPlan) -> list[int]:
    """Which rows of the step's logits choose tokens; the others are for prompt log-probabilities."""
    rows = list(range(len(plan.decodes)))
    end = len(rows)
    for chunk in plan.chunks:
        end += len(chunk.logit_positions())
        if chunk.samples:
            rows.append(end - 1)
    return rows


def _told(logprobs: Logprobs, token_ids: Seq[int], limits: Seq[int]) -> list[TokenLogprob]:
    """Make the records of L rows, each with as many alternatives as its request asks for."""
    chosen: list[float] = logprobs.chosen_L.tolist()
    top_ids: list[list[int]] = logprobs.top_ids_LN.tolist()
    top: list[list[float]] = logprobs.top_LN.tolist()
    return [
        TokenLogprob(token_id, value, tuple(zip(ids[:limit], values[:limit], strict=True)))
        for token_id, value, ids, values, limit in zip(token_ids, chosen, top_ids, top, limits, strict=True)
    ]
