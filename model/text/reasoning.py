"""The thinking part of an answer, `<think> ... </think>`, told from the answer proper while the text grows."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from divisi.model.text.tags import THINK, THINK_END, Segment, Tag


class Split(NamedTuple):
    """What a segment adds to either part."""

    reasoning: str = ""
    content: tuple[Segment, ...] = ()


class ReasoningSplitter:
    """Splits a growing answer. The parts, joined, don't depend on how the text is cut into pieces.

    Only what the answer begins with can be its thinking; a tag further on is content. Line ends next to the tags belong
    to the form and are dropped, as templates do when they show the turn again. A thinking part that never ends is all.
    """

    def __init__(self, *, opened: bool) -> None:
        """`opened`: the prompt ends with `<think>`, so that the answer may hold the closing tag only."""
        self._opened = opened
        self._step: Callable[[Segment], Split] = self._begin
        self._blank = ""  # at the beginning, before it is clear of which part it is
        self._newlines = 0  # line ends of the thinking that go out only if text follows them
        self._at_start = True  # of the thinking, or of what follows it
        self.thinking = opened
        """Whether the text stands inside the thinking part."""
        self.closed = False
        """Whether a thinking part has ended."""
        self.answering = False
        """Whether the text stands past the thinking part, or has none."""

    @property
    def passes(self) -> bool:
        """Whether all that follows is content, as it is."""
        return self.answering and not self._at_start

    def push(self, segment: Segment) -> Split:
        """What a segment adds."""
        return self._step(segment)

    def finish(self) -> Split:
        """At the end of the text: blanks alone are thinking only where it was open."""
        blank, self._blank = self._blank, ""
        if self._opened:
            return Split(self._release(blank))
        return Split(content=(blank,) if blank else ())

    def _begin(self, segment: Segment) -> Split:
        """Leading blanks and an opening tag, or neither."""
        if isinstance(segment, Tag) and segment.name == THINK:
            self._blank, self.thinking, self._step = "", True, self._think
            return Split()
        if isinstance(segment, str) and not segment.strip():
            self._blank += segment
            return Split()
        blank, self._blank = self._blank, ""
        if self._opened:
            self._step = self._think
            before = self._release(blank)
            reasoning, content = self._think(segment)
            return Split(before + reasoning, content)
        self._at_start, self._step, self.answering = False, self._answer, True
        return Split(content=(blank, segment) if blank else (segment,))

    def _think(self, segment: Segment) -> Split:
        if isinstance(segment, str):
            return Split(self._release(segment))
        if segment.name != THINK_END:
            return Split(self._release(segment.text))
        self.thinking, self.closed, self.answering = False, True, True
        self._at_start, self._step = True, self._answer
        return Split()

    def _release(self, text: str) -> str:
        if self._at_start:
            text = text.lstrip("\n")
        body = text.rstrip("\n")
        before, after = self._newlines, len(text) - len(body)
        if not body:
            self._newlines += after
            return ""
        self._newlines, self._at_start = after, False
        return "\n" * before + body

    def _answer(self, segment: Segment) -> Split:
        if self._at_start and isinstance(segment, str):
            segment = segment.lstrip("\n")
        self._at_start = self._at_start and not segment
        return Split(content=(segment,) if segment else ())
