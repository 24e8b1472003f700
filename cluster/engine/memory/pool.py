"""A pool of numbered things of one kind, with a count of holders for each. Plain Python; the things lie elsewhere."""

from __future__ import annotations

from collections.abc import Iterable


class Pool:
    """Hands out the numbers 0 to `size - 1`, the most recently freed first.

    A number has one holder when it is taken, one more with each `share`, and is free once all gave it back.
    """

    def __init__(self, what: str, size: int) -> None:
        """`what` names one of its things in messages."""
        self._what = what
        self._free = list(range(size - 1, -1, -1))
        self._holders = [0] * size

    @property
    def size(self) -> int:
        """How many there are."""
        return len(self._holders)

    @property
    def num_free(self) -> int:
        """How many `take` can hand out."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """How many somebody holds; counted apart from the free ones, so that a leak shows."""
        return self.size - self._holders.count(0)

    def holders(self, number: int) -> int:
        """How many hold it."""
        return self._holders[number]

    def take(self, count: int) -> list[int]:
        """Take `count`; the caller has checked `num_free`."""
        assert 0 <= count <= len(self._free), f"{count} of kind {self._what} wanted, {len(self._free)} free"
        if count == 0:
            return []
        taken = self._free[-count:][::-1]
        del self._free[-count:]
        for number in taken:
            self._holders[number] = 1
        return taken

    def share(self, numbers: Iterable[int]) -> None:
        """Hold what somebody holds already."""
        for number in numbers:
            assert self._holders[number], f"{self._what} {number} is free"
            self._holders[number] += 1

    def give_back(self, numbers: Iterable[int]) -> None:
        """Hold them no longer."""
        for number in numbers:
            assert self._holders[number], f"{self._what} {number} is free"
            self._holders[number] -= 1
            if not self._holders[number]:
                self._free.append(number)
