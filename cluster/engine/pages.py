"""The pool of KV pages: which are free, which are in use. Plain Python; the memory itself is the model's."""

from __future__ import annotations

from collections.abc import Iterable


def pages_for(num_tokens: int, page_size: int) -> int:
    """How many pages hold `num_tokens` tokens."""
    return -(-num_tokens // page_size)


class PagePool:
    """Hands out page numbers 0 to `num_pages - 1`, the most recently freed first."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._references = bytearray(num_pages)

    @property
    def num_free(self) -> int:
        """Pages that `take` can hand out."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Pages that somebody holds; counted apart from the free list, so that a leak shows."""
        return self.num_pages - self._references.count(0)

    def take(self, count: int) -> list[int]:
        """Take `count` pages; the caller has checked `num_free`."""
        assert 0 <= count <= len(self._free), f"{count} pages wanted, {len(self._free)} free"
        if count == 0:
            return []
        taken = self._free[-count:][::-1]
        del self._free[-count:]
        for page in taken:
            self._references[page] = 1
        return taken

    def give_back(self, pages: Iterable[int]) -> None:
        """Return pages to the pool."""
        for page in pages:
            assert self._references[page] == 1, f"page {page} is not in use"
            self._references[page] = 0
            self._free.append(page)
