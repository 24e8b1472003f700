"""The pool of state slots. Plain Python; the memory itself is the model's.

A decoding sequence holds one slot. A prefilling one holds a second, its *spare*: a chunk reads the committed state
from the slot and writes its end state to the spare, and commit swaps the two, so that a chunk that aborts has
changed nothing. Both are reserved at admission, hence a prefill never waits for a slot half way.
"""

from __future__ import annotations

SLOTS_TO_PREFILL = 2


class SlotPool:
    """Hands out slot numbers 0 to `num_slots - 1`, the most recently freed first."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._free = list(range(num_slots - 1, -1, -1))
        self._used = bytearray(num_slots)

    @property
    def num_free(self) -> int:
        """Slots that nobody holds."""
        return len(self._free)

    @property
    def can_prefill(self) -> bool:
        """Whether a slot and a spare are free."""
        return len(self._free) >= SLOTS_TO_PREFILL

    def take(self) -> int:
        """Take a slot; the caller has checked `num_free`."""
        slot = self._free.pop()
        self._used[slot] = 1
        return slot

    def give_back(self, slot: int) -> None:
        """Return a slot to the pool."""
        assert self._used[slot] == 1, f"slot {slot} is not in use"
        self._used[slot] = 0
        self._free.append(slot)
