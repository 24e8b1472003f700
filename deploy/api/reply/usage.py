"""Token counts, and the log-probabilities of a prompt, which both endpoints spell alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from divisi.cluster.request import Request, TokenLogprob
from divisi.deploy.api.body.protocol import MtpOptions
from divisi.deploy.api.reply.answer import Delta
from divisi.model.text import Tokenizer

MIN_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot say."""


class Drafts:
    """What was drafted for the answers of a request; told where the server drafts at all."""

    def __init__(self, asked: MtpOptions | None, request: Request) -> None:
        """The worker is asked for what the client asks, within the server's limit."""
        self._limit, self._named = request.max_draft_tokens, asked is not None
        self._drafted = self._accepted = 0

    def add(self, delta: Delta) -> None:
        """Count one more piece of an answer."""
        self._drafted += delta.drafted
        self._accepted += delta.accepted

    def details(self) -> dict[str, int]:
        """Entries of `completion_tokens_details`; the limit, too, where the client named one. None of it is billed."""
        if self._limit is None:
            return {}
        told = {
            "accepted_prediction_tokens": self._accepted,
            "rejected_prediction_tokens": self._drafted - self._accepted,
        }
        return told | ({"max_draft_tokens": self._limit} if self._named else {})


def usage(prompt_tokens: int, completion_tokens: int, details: Mapping[str, int]) -> dict[str, Any]:
    """OpenAI's `usage` object. Completion tokens are those of the answer; the stop id that ends it isn't one."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        **({"completion_tokens_details": details} if details else {}),
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
