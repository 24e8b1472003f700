"""An answer's text to what a chat reply shows: reasoning, content and tool calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from divisi.model.text.reasoning import ReasoningSplitter
from divisi.model.text.tool_calls import Part, TextPart, ToolCallParser

FinishReason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True, slots=True)
class ParseRule:
    """What to look for in an answer."""

    thinks: bool
    """Whether it may have a thinking part."""
    opened: bool
    """Whether the prompt ends inside it."""
    names: frozenset[str]
    """Functions that may be called; empty where none may."""
    single: bool
    """Whether the answer ends with its first call."""


@dataclass(frozen=True, slots=True)
class ReasoningPart:
    """Text of the thinking part."""

    text: str


ChatPart = ReasoningPart | Part


class ChatParser:
    """Follows one answer. Its parts, joined, don't depend on how the text comes."""

    def __init__(self, rule: ParseRule) -> None:
        self._splitter = ReasoningSplitter(opened=rule.opened) if rule.thinks else None
        # Counts on the text as generated: a stop string that is held back would shift the count.
        self._counter = ReasoningSplitter(opened=rule.opened) if rule.thinks else None
        self._uncounted = 0
        self._calls = ToolCallParser(rule.names, single=rule.single) if rule.names else None

    @property
    def done(self) -> bool:
        """Whether the answer is over: it has the one call that it may have."""
        return self._calls is not None and self._calls.done

    def push(self, text: str) -> list[ChatPart]:
        """What a piece of text adds."""
        if self._splitter is None:
            return self._content(text)
        reasoning, content = self._splitter.push(text)
        return [*_reasoning(reasoning), *self._content(content)]

    def finish(self) -> list[ChatPart]:
        """What was held back, at the end of the text."""
        parts: list[ChatPart] = []
        if self._splitter is not None:
            reasoning, content = self._splitter.finish()
            parts = [*_reasoning(reasoning), *self._content(content)]
        return parts if self._calls is None else [*parts, *self._calls.finish()]

    def count(self, text: str) -> int:
        """Tokens found to be of the thinking part, tags included, by the text of one more token."""
        counter = self._counter
        if counter is None:
            return 0
        counter.push(text)
        self._uncounted += 1
        if not counter.thinking and not counter.closed and not counter.answering:
            return 0  # the opening tag isn't whole yet
        if not counter.thinking:
            self._counter = None
        found, self._uncounted = (0 if counter.answering and not counter.closed else self._uncounted), 0
        return found

    def reason(self, finish_reason: FinishReason) -> FinishReason:
        """`tool_calls` for an end after whole calls; a broken block leaves the reason that it had."""
        calls = self._calls
        called = calls is not None and calls.calls > 0 and not calls.broken
        return "tool_calls" if called and finish_reason == "stop" else finish_reason

    def _content(self, text: str) -> list[ChatPart]:
        if self._calls is not None:
            return list(self._calls.push(text))
        return [TextPart(text)] if text else []


def _reasoning(text: str) -> list[ChatPart]:
    return [ReasoningPart(text)] if text else []
