"""Token counts, and the log-probabilities of a prompt, which both endpoints spell alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from divisi.cluster.request import TokenLogprob
from divisi.model.text import Tokenizer

MIN_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot say."""


def usage(prompt_tokens: int, completion_tokens: int, reasoning_tokens: int | None = None) -> dict[str, Any]:
    """OpenAI's `usage` object. Completion tokens are those of the answer; the stop id that ends it isn't one.

    `reasoning_tokens`: how many of them are thinking, told where the model thinks at all.
    """
    details = {} if reasoning_tokens is None else {"completion_tokens_details": {"reasoning_tokens": reasoning_tokens}}
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        **details,
    }


def spell_prompt_logprobs(
    told: Sequence[TokenLogprob | None], asked: int, tokenizer: Tokenizer
) -> list[dict[str, dict[str, Any]] | None]:
    """vLLM's `prompt_logprobs`: per token the `asked` best and the token itself, by id; null for the first.

    The rank of a token that isn't among the best is not known, hence null.
    """
    return [None if token is None else _spell(token, asked, tokenizer) for token in told]


def _spell(token: TokenLogprob, asked: int, tokenizer: Tokenizer) -> dict[str, dict[str, Any]]:
    entries: dict[str, dict[str, Any]] = {}
    ranked: list[tuple[int, float, int | None]] = [(*best, rank) for rank, best in enumerate(token.top[:asked], 1)]
    own_rank = next((rank for rank, (token_id, _) in enumerate(token.top, 1) if token_id == token.token_id), None)
    for token_id, logprob, rank in [*ranked, (token.token_id, token.logprob, own_rank)]:
        name = tokenizer.name_of(token_id)
        entries[str(token_id)] = {"logprob": max(logprob, MIN_LOGPROB), "rank": rank, "decoded_token": name}
    return entries
