"""How the rows of a sequence are sampled, as the sampler is told."""

from __future__ import annotations

from divisi.cluster.engine.sequence import Sequence
from divisi.model.sampling.logit_rules import SequenceRules
from divisi.model.sampling.sampler import SequenceSampling
from divisi.model.sampling.token_counts import History


def sequence_sampling(sequence: Sequence) -> SequenceSampling:
    """By what its request asks for, as things stand."""
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
