"""What crosses between the ingress and an attention worker: a `Request` in, `TokenEvent`s out. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from divisi.cluster.telemetry.slices import Slice
from divisi.cluster.triggers import Span

EndReason = Literal["stop", "length", "cancelled", "rejected", "error", "lost"]


_HUGE = 1e9
"""No logit in fp32 becomes infinite by it."""
SAMPLING_LIMITS = {
    "temperature": (0.0, _HUGE),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, _HUGE),  # logits are divided by it
    "presence_penalty": (-_HUGE, _HUGE),
    "frequency_penalty": (-_HUGE, _HUGE),
    "logit_bias": (-_HUGE, _HUGE),
}
"""Least and most of the numbers in `Sampling` that a worker can compute with; the API's own are narrower."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen. `temperature` 0 is greedy; the defaults of all else are off.

    `seed` is taken modulo 2**64. The token at a position depends on the logits, these numbers, the tokens before it and
    the position only. `bad_words` are token sequences that must not appear; of each, the last token is masked where the
    ones before it stand at the end. The repetition penalty counts prompt and answer, the other two the answer only.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Request:
    """One answer to produce.

    `stop_ids` end the answer and are not part of it; so do `content_stop_ids`, but only outside of `spans`.
    `logprobs`: None for none, 0 for the chosen token's only, n for the n best besides; `prompt_logprobs` the same
    for the prompt's tokens. Until `min_tokens` were generated, the stop ids of both kinds are masked. `grammar` is
    an llguidance grammar, validated by the ingress, that the answer must follow. `max_draft_tokens` limits what the MTP
    layer drafts in a step, 0 turns it off; None: as the gang does. `slice` is what its times are counted under.
    `trace`, a `traceparent`, names the span that the worker's are children of; empty where none is recorded.
    `answered` are the answer's first tokens, where another worker has begun it: they count as generated and are not
    told again. `arrived` is when the request came to its ingress, in seconds of this process's monotonic clock (the
    wire carries its age): who came first goes first.
    """

    request_id: str
    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling
    stop_ids: frozenset[int] = frozenset()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    min_tokens: int = 0
    grammar: str | None = None
    max_draft_tokens: int | None = None
    content_stop_ids: frozenset[int] = frozenset()
    spans: tuple[Span, ...] = ()
    slice: Slice = "chat"
    trace: str = ""
    answered: tuple[int, ...] = ()
    arrived: float = 0.0


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of one token under the raw logits (before temperature and filters); `top` is best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """Progress of one request. Exactly one event of a request is terminal: the one with a `finish_reason`.

    `prompt_logprobs` comes once, on the first event; its entry 0 is None, as nothing precedes the first token.
    `drafted` and `accepted` count the tokens that the MTP layer has proposed for the answer so far, and those of them
    that stood. `error` says what went wrong where the reason is "error", or "rejected": what the request asks for
    leaves no token to choose; or "lost": ranks die of it. `stop_id` is the stop id that ended the answer. `index`
    counts the answer's tokens before these.
    """

    request_id: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    finish_reason: EndReason | None = None
    error: str | None = None
    stop_id: int | None = None
    drafted: int = 0
    accepted: int = 0
    index: int = 0
