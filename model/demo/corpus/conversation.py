"""A conversation, and the text that a model is to continue or to learn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from divisi.model.text.template import ChatTemplate

Message = dict[str, Any]


@dataclass(slots=True)
class Conversation:
    """Messages and tools as the API takes them; the last message is the assistant's."""

    messages: list[Message] = field(default_factory=list)
    tools: list[dict[str, Any]] = field(default_factory=list)
    thoughts: dict[int, str] = field(default_factory=dict)
    """What the assistant thinks in the message at an index, if it is asked to."""
    kind: str = ""

    def user(self, content: str) -> None:
        """The user speaks."""
        self.messages.append({"role": "user", "content": content})

    def assistant(self, content: str, thought: str = "") -> None:
        """The assistant answers."""
        if thought:
            self.thoughts[len(self.messages)] = thought
        self.messages.append({"role": "assistant", "content": content})

    def calls(self, calls: list[tuple[str, dict[str, Any]]], thought: str = "") -> None:
        """The assistant calls tools."""
        if thought:
            self.thoughts[len(self.messages)] = thought
        made = [
            {"id": f"call_{index}", "type": "function", "function": {"name": name, "arguments": arguments}}
            for index, (name, arguments) in enumerate(calls)
        ]
        self.messages.append({"role": "assistant", "content": "", "tool_calls": made})

    def tool(self, content: str) -> None:
        """A tool answers."""
        self.messages.append({"role": "tool", "tool_call_id": "call_0", "content": content})

    def turns(self) -> Iterator[int]:
        """Indices of the assistant's messages."""
        return (index for index, message in enumerate(self.messages) if message["role"] == "assistant")


def render(template: ChatTemplate, conversation: Conversation, thinks: bool) -> str:
    """The whole text to learn. With `thinks` it ends at the last turn that has a thought, which is shown."""
    last = max(conversation.thoughts, default=None) if thinks else None
    if last is None:
        return template.render(conversation.messages, tools=conversation.tools, add_generation_prompt=False)
    before = conversation.messages[:last]
    whole = template.render(conversation.messages[: last + 1], tools=conversation.tools, add_generation_prompt=False)
    prompt = template.render(before, tools=conversation.tools)
    assert whole.startswith(prompt)
    return f"{prompt}<think>\n{conversation.thoughts[last]}\n</think>\n\n{whole[len(prompt) :]}"
