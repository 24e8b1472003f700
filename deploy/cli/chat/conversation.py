"""What a chat remembers, and how an answer grows out of a stream's deltas."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

RESERVED = frozenset({"messages", "model", "stream", "stream_options", "n", "tools"})
"""Fields that the chat sets itself."""


class ParameterError(ValueError):
    """A parameter that is no NAME=VALUE, or that the chat sets itself."""


def _no_json(name: str) -> None:
    """NaN and Infinity, which Python reads and JSON does not have: they are text like any other."""
    raise ValueError(name)


@dataclass
class ToolCall:
    """A call that the model asks for; `arguments` is JSON text, as far as it has come."""

    id: str = ""
    name: str = ""
    arguments: str = ""

    def message(self) -> dict[str, Any]:
        """As the assistant's message carries it back to the server."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclass
class Reply:
    """An answer so far."""

    content: str = ""
    reasoning: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    finish_reason: str | None = None
    usage: Mapping[str, Any] = field(default_factory=dict)

    def add(self, event: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """Take one stream event in; yields what it adds as ("reasoning" | "content", text)."""
        if event.get("usage"):
            self.usage = event["usage"]
        for choice in event.get("choices") or ():
            delta = choice.get("delta") or {}
            if reasoning := delta.get("reasoning") or delta.get("reasoning_content"):
                self.reasoning += reasoning
                yield "reasoning", reasoning
            if content := delta.get("content"):
                self.content += content
                yield "content", content
            for part in delta.get("tool_calls") or ():
                self._add_call(part)
            self.finish_reason = choice.get("finish_reason") or self.finish_reason

    def _add_call(self, part: Mapping[str, Any]) -> None:
        index = part.get("index", len(self.calls))
        while len(self.calls) <= index:
            self.calls.append(ToolCall())
        call, function = self.calls[index], part.get("function") or {}
        call.id = part.get("id") or call.id
        call.name += function.get("name") or ""
        call.arguments += function.get("arguments") or ""

    def message(self) -> dict[str, Any]:
        """The assistant's message for the next request; reasoning stays out of it, as templates want it."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.calls:
            message["tool_calls"] = [call.message() for call in self.calls]
        return message


@dataclass
class Conversation:
    """The turns so far and what every request carries."""

    model: str
    system: str | None = None
    params: dict[str, Any] = field(default_factory=dict)
    tools: list[dict[str, Any]] = field(default_factory=list)
    messages: list[dict[str, Any]] = field(default_factory=list)

    def body(self) -> dict[str, Any]:
        """The next request."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        tools = {"tools": self.tools} if self.tools else {}
        stream = {"stream": True, "stream_options": {"include_usage": True}}
        return {"model": self.model, "messages": [*system, *self.messages], **stream, **tools, **self.params}

    def ask(self, text: str) -> None:
        """Add a user's turn."""
        self.messages.append({"role": "user", "content": text})

    def give(self, call: ToolCall, result: str) -> None:
        """Add a tool's result."""
        self.messages.append({"role": "tool", "tool_call_id": call.id, "content": result})

    def set(self, assignment: str) -> None:
        """Apply NAME=VALUE; the value is JSON or else text, and no value unsets the name. Raises ParameterError."""
        name, equals, value = assignment.partition("=")
        if not equals or not name.isidentifier():
            raise ParameterError(f"{assignment!r}: write NAME=VALUE, as in temperature=0.2")
        if name in RESERVED:
            raise ParameterError(f"{name}: the chat sets this itself")
        if not value:
            self.params.pop(name, None)
            return
        try:
            self.params[name] = json.loads(value, parse_constant=_no_json)
        except ValueError:
            self.params[name] = value
