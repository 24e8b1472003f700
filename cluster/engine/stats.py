"""Counters of one attention worker's engine, as a plain record that can cross processes. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot. Counts of tokens, steps and preemptions are totals since the engine was made."""

    running: int
    waiting: int
    queued_tokens: int
    """Tokens of admitted and waiting requests that are still to be prefilled."""
    free_pages: int
    total_pages: int
    free_slots: int
    total_slots: int
    steps: int
    aborted_steps: int
    preemptions: int
    prefill_tokens: int
    """Tokens computed in prefill chunks, those computed again after a preemption included."""
    generated_tokens: int
    drafted_tokens: dict[str, int]
    """Tokens that the MTP layer proposed, by slice and place in the step: `chat 1`."""
    accepted_tokens: dict[str, int]
    """Those of them that stood; the answers' tokens all the same."""
    step_seconds: dict[str, float]
    """Time in steps by part: scheduler, mixer, router, dispatch (sending), shared (the shared expert), experts (the
    routed ones, or the wait for them), draft, sampling, other."""
    aborted_drafting: int = 0
    """Of the aborted steps those that were drafting."""
