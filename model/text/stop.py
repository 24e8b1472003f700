"""Stop strings over a stream of text."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence


class StopMatcher:
    """Finds the first stop string in a text that comes in pieces, and never lets a part of it out.

    "First" is the one that is complete first, the longest of those; so the result is the same however the text is
    cut into pieces. An automaton (Aho and Corasick 1975) costs a constant per character whatever the number and
    length of the stop strings; its depth is the length of the longest suffix that may still become one, which is
    exactly what has to be held back.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """`stops`: strings to stop at, none of them empty (ValueError)."""
        if not all(stops):
            raise ValueError("a stop string must not be empty")
        self._children: list[dict[str, int]] = [{}]
        self._fail = [0]
        self._depth = [0]
        self._match = [0]  # length of the longest stop string that ends at this node
        for stop in stops:
            self._add(stop)
        self._link()
        self._state = 0
        self._held = ""
        self.matched: str | None = None
        """The stop string that ended the text."""

    def push(self, piece: str) -> str:
        """Text that may go out now. Once `matched` is set, the text is over and further pieces are nothing."""
        if self.matched is not None or not piece:
            return ""
        text = self._held + piece
        state = self._state
        for index, char in enumerate(piece, start=len(self._held) + 1):
            state = self._next(state, char)
            if length := self._match[state]:
                self.matched = text[index - length : index]
                self._held = ""
                return text[: index - length]
        self._state = state
        cut = len(text) - self._depth[state]
        self._held = text[cut:]
        return text[:cut]

    def flush(self) -> str:
        """At the end: what was held back is no stop string after all."""
        held, self._held, self._state = self._held, "", 0
        return held

    def _add(self, stop: str) -> None:
        node = 0
        for char in stop:
            child = self._children[node].get(char)
            if child is None:
                child = len(self._children)
                self._children[node][char] = child
                self._children.append({})
                self._fail.append(0)
                self._depth.append(self._depth[node] + 1)
                self._match.append(0)
            node = child
        self._match[node] = len(stop)

    def _link(self) -> None:
        """Failure links in breadth-first order: a node's link is its longest proper suffix that is in the tree."""
        queue = deque(self._children[0].values())
        while queue:
            node = queue.popleft()
            for char, child in self._children[node].items():
                self._fail[child] = self._next(self._fail[node], char)
                queue.append(child)
            self._match[node] = self._match[node] or self._match[self._fail[node]]

    def _next(self, state: int, char: str) -> int:
        while (child := self._children[state].get(char)) is None:
            if state == 0:
                return 0
            state = self._fail[state]
        return child
