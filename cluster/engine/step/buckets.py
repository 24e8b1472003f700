"""The sizes that decode steps are laid out for on a GPU: steps of one size launch the same, at the same addresses."""

from __future__ import annotations

from bisect import bisect_left

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
"""Of sequences, and of rows; what is larger stays as it is. From 16 on less than half as much again is padding."""


def bucket(count: int, most: int) -> int:
    """The next size, or ``most`` where that is less."""
    place = bisect_left(SIZES, count)
    return count if place == len(SIZES) else min(SIZES[place], most)
