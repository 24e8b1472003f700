"""The thinking part of an answer, `<think> ... </think>`, told from the answer proper while the text grows."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from divisi.model.text.tool_calls import tag_prefix

OPEN = "<think>"
CLOSE = "</think>"


class Split(NamedTuple):
    """What a piece of text adds to either part."""

    reasoning: str
    content: str


def leaves_open(prompt: str) -> bool:
    """Whether a prompt ends inside the thinking part, as templates of thinking models leave it."""
    return prompt.rstrip().endswith(OPEN)


class ReasoningSplitter:
    """Splits a growing answer. The parts, joined, don't depend on how the text is cut into pieces.

    Only what the answer begins with can be its thinking; a tag further on is text. Line ends next to the tags belong
    to the form and are dropped, as templates do when they show the turn again. A thinking part that never ends is all.
    """

    def __init__(self, *, opened: bool) -> None:
        """`opened`: the prompt ends with `<think>`, so that the answer may hold the closing tag only."""
        self._opened = opened
        self._step: Callable[[str], Split] = self._begin
        self._held = ""  # what may become a tag
        self._newlines = 0  # line ends of the thinking that go out only if text follows them
        self._at_start = True  # of the thinking, or of what follows it
        self.thinking = opened
        """Whether the text stands inside the thinking part."""
        self.closed = False
        """Whether a thinking part has ended."""
        self.answering = False
        """Whether the text stands past the thinking part, or has none."""

    def push(self, text: str) -> Split:
        """What a piece of text adds."""
        return self._step(text)

    def finish(self) -> Split:
        """At the end of the text: what was held back is no tag after all."""
        held, self._held = self._held, ""
        if self._step == self._begin and not self._opened:
            return Split("", held)
        if self._step == self._answer:
            return Split("", "")
        return Split(self._release(held), "")

    def _begin(self, text: str) -> Split:
        """Leading whitespace and an opening tag, or neither."""
        text = self._held + text
        bare = text.lstrip()
        if OPEN.startswith(bare) and bare != OPEN:  # not said yet; an empty text is the beginning of everything
            self._held = text
            return Split("", "")
        self._held = ""
        if bare.startswith(OPEN):
            self.thinking, self._step = True, self._think
            return self._think(bare[len(OPEN) :])
        if self._opened:
            self._step = self._think
            return self._think(text)
        self._at_start, self._step, self.answering = False, self._answer, True
        return Split("", text)

    def _think(self, text: str) -> Split:
        text = self._held + text
        at = text.find(CLOSE)
        end = at if at >= 0 else len(text) - tag_prefix(text, CLOSE)
        reasoning = self._release(text[:end])
        if at < 0:
            self._held = text[end:]
            return Split(reasoning, "")
        self._held, self.thinking, self.closed = "", False, True
        self._at_start, self._step, self.answering = True, self._answer, True
        return Split(reasoning, self._answer(text[at + len(CLOSE) :]).content)

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

    def _answer(self, text: str) -> Split:
        if self._at_start:
            text = text.lstrip("\n")
            self._at_start = not text
        return Split("", text)
