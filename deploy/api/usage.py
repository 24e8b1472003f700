"""Token counts and number bounds that both endpoints' answers share."""

from __future__ import annotations

MIN_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot say."""


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """OpenAI's `usage` object. Completion tokens are those of the answer; the stop id that ends it isn't one."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
