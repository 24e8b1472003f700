"""The slices by which latencies are told: a fixed list, since each value of a label is a series more."""

from __future__ import annotations

from typing import Literal, get_args

Slice = Literal["chat", "tools", "long"]
SLICES: tuple[Slice, ...] = get_args(Slice)
LONG_PROMPT = 8192
"""Tokens from which on a prompt is long."""


def slice_of(prompt_tokens: int, tools: bool) -> Slice:
    """A request's slice; a long prompt with tools is `long`, which is what its times depend on."""
    if prompt_tokens >= LONG_PROMPT:
        return "long"
    return "tools" if tools else "chat"
