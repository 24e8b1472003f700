"""From the sampling fields of a body to the engine's `Sampling`."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace

from divisi.cluster.request import Sampling
from divisi.deploy.api.body.sampling_fields import SamplingFields
from divisi.deploy.api.errors import ApiError
from divisi.model.text import TextCodec, Tokenizer

_SEED_STEP = 0x9E37_79B9_7F4A_7C15
"""Odd, so that the seeds of 2**64 choices differ; the noise hashes them (kernels/sampling/noise.py)."""

_CONVERTED = {"temperature", "top_k", "top_p", "seed", "logit_bias", "allowed_token_ids", "bad_words"}
_AS_THEY_ARE = tuple(field.name for field in fields(Sampling) if field.name not in _CONVERTED)


def compile_sampling(body: SamplingFields, text: TextCodec, vocab_size: int) -> Sampling:
    """Resolve defaults, words and ids. Raises ApiError for token ids outside the vocabulary."""
    defaults = text.sampling
    biases = {int(token_id): bias for token_id, bias in (body.logit_bias or {}).items()}
    allowed = body.allowed_token_ids
    check_ids("logit_bias", biases, vocab_size)
    check_ids("allowed_token_ids", allowed or (), vocab_size)
    return Sampling(
        **{name: value for name in _AS_THEY_ARE if (value := getattr(body, name)) is not None},
        temperature=defaults.temperature if body.temperature is None else body.temperature,
        top_k=defaults.top_k if body.top_k is None else max(body.top_k, 0),
        top_p=defaults.top_p if body.top_p is None else body.top_p,
        seed=secrets.randbits(63) if body.seed is None else body.seed % 2**64,
        logit_bias=tuple(sorted(biases.items())),
        allowed_token_ids=None if allowed is None else tuple(sorted(set(allowed))),
        bad_words=_bad_words(body.bad_words or (), text.tokenizer),
    )


def choice_seed(sampling: Sampling, index: int) -> Sampling:
    """The sampling of choice `index`: a seed of its own, the first one's being the request's."""
    return replace(sampling, seed=(sampling.seed + index * _SEED_STEP) % 2**64) if index else sampling


def check_ids(param: str, ids: Iterable[int], vocab_size: int) -> None:
    """Raise ApiError for a token id outside the vocabulary."""
    if (highest := max(ids, default=0)) >= vocab_size:
        raise ApiError(
            f"{param}: token id {highest} is outside the vocabulary of {vocab_size}; send ids below it", param=param
        )


def _bad_words(words: Sequence[str], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """Token sequences of words that must not appear: at the beginning of a text, and, as in vLLM, after a blank."""
    banned: dict[tuple[int, ...], None] = {}
    for word in words:
        for spelled in (word, f" {word.lstrip()}"):
            if ids := tuple(tokenizer.encode(spelled, add_special_tokens=False)):
                banned[ids] = None
    return tuple(banned)
