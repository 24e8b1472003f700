"""Walks that stop while they wait for others, so that one goes on while another one waits."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TypeVar

T = TypeVar("T")


def in_turns(walks: Sequence[Generator[None, None, T]]) -> list[T]:
    """Let each go on to its next stop, in turns; returns what they return. All have as many stops."""
    ended: list[T] = []
    while len(ended) < len(walks):
        for walk in walks:
            try:
                next(walk)
            except StopIteration as end:
                ended.append(end.value)
    return ended
