"""The turns of a conversation, as clients write them and as they send answers back, and what templates get of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from divisi.deploy.api.body.base import one_of, text_or_list
from divisi.deploy.api.body.replayed import Place, Replayed
from divisi.deploy.api.body.tools import AssistantCall, AssistantCalls, CalledFunction, CallId

MAX_MESSAGES = 4096
MAX_PARTS = 1024
_EXPECTED = "a string or a list of text parts"

Name = Annotated[str, Field(max_length=256)]


class TextPart(Replayed):
    """One part of list-typed content."""

    place: ClassVar[Place] = "part"
    type: Literal["text"]
    text: str

    @property
    def said(self) -> str | None:
        """Its share of the content."""
        return self.text


class RefusalPart(Replayed):
    """Content of an answer in which a model declined."""

    place: ClassVar[Place] = "part"
    type: Literal["refusal"]
    refusal: str

    @property
    def said(self) -> str | None:
        """Its share of the content."""
        return self.refusal


class ThinkingPart(Replayed):
    """Reasoning of an earlier answer, in Anthropic's form; what is redacted has no text."""

    place: ClassVar[Place] = "part"
    type: Literal["thinking", "redacted_thinking"]
    thinking: str = ""

    @property
    def said(self) -> str | None:
        """None: it is told apart from the content."""
        return None


_PARTS = {"refusal": "<refusal>", "thinking": "<thinking>", "redacted_thinking": "<thinking>"}


def _part_kind(value: object) -> str:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return _PARTS.get(str(kind), "<text>")


AnswerPart = Annotated[
    Annotated[TextPart, Tag("<text>")]
    | Annotated[RefusalPart, Tag("<refusal>")]
    | Annotated[ThinkingPart, Tag("<thinking>")],
    Discriminator(_part_kind),
]
Content = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[list[TextPart], Field(min_length=1, max_length=MAX_PARTS, fail_fast=True), Tag("<list>")],
    one_of(text_or_list, _EXPECTED),
]
ToolContent = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[list[TextPart], Field(max_length=MAX_PARTS, fail_fast=True), Tag("<list>")],
    one_of(text_or_list, _EXPECTED),
]
AnswerContent = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[list[AnswerPart], Field(max_length=MAX_PARTS, fail_fast=True), Tag("<list>")],
    one_of(text_or_list, _EXPECTED),
]


class Instruction(Replayed):
    """A turn of the caller's."""

    place: ClassVar[Place] = "message"
    role: Literal["system", "developer", "user"]
    content: Content
    name: Name | None = None

    @property
    def chars(self) -> int:
        """About how much text a template makes of it."""
        return len(_joined(self.content))

    def plain(self) -> dict[str, Any]:
        """As templates want it: text parts joined by line ends, `developer` under its older name."""
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": _joined(self.content)} | _named(self.name)


class AssistantMessage(Replayed):
    """An earlier answer. It may be empty: one that was cut, or that only reasoned, is a part of the conversation."""

    place: ClassVar[Place] = "message"
    role: Literal["assistant"]
    content: AnswerContent | None = None
    name: Name | None = None
    tool_calls: AssistantCalls | None = None
    function_call: CalledFunction | None = None
    """The older form of one tool call."""
    refusal: str | None = None
    """Stands for the content where there is none."""
    reasoning: str | None = None
    """Whether it is shown again is the template's matter."""
    reasoning_content: str | None = None
    """The same under its older name."""
    thinking_blocks: Annotated[list[ThinkingPart], Field(max_length=MAX_PARTS, fail_fast=True)] | None = None
    """The same in Anthropic's form."""

    @property
    def calls(self) -> Sequence[AssistantCall]:
        """Its calls, the one in the older form too."""
        calls = list(self.tool_calls or ())
        if self.function_call is not None and self.function_call not in [call.function for call in calls]:
            calls.append(AssistantCall(id=_function_id(self.function_call.name), function=self.function_call))
        return calls

    @property
    def thought(self) -> str:
        """Its reasoning, in whichever form it came; the first that says something."""
        parts = self.content if isinstance(self.content, list) else ()
        forms = (self.reasoning, self.reasoning_content, _thoughts(self.thinking_blocks or ()), _thoughts(parts))
        return next(filter(None, forms), "")

    @property
    def text(self) -> str:
        """What it said."""
        return _joined(self.content or "") or self.refusal or ""

    @property
    def chars(self) -> int:
        """About how much text a template makes of it."""
        return len(self.text) + len(self.thought) + sum(call.function.chars for call in self.calls)

    def plain(self) -> dict[str, Any]:
        """As templates want it."""
        message: dict[str, Any] = {"role": self.role, "content": self.text} | _named(self.name)
        if calls := self.calls:
            message["tool_calls"] = [call.plain() for call in calls]
        if thought := self.thought:
            message["reasoning_content"] = thought  # the name that this family's templates read
        return message


class ToolMessage(Replayed):
    """What a tool gave; nothing is an empty text."""

    place: ClassVar[Place] = "message"
    role: Literal["tool"]
    content: ToolContent | None = None
    name: Name | None = None
    tool_call_id: CallId

    @property
    def chars(self) -> int:
        """About how much text a template makes of it."""
        return len(_joined(self.content or ""))

    def plain(self) -> dict[str, Any]:
        """As templates want it."""
        content = _joined(self.content or "")
        return {"role": "tool", "content": content, "tool_call_id": self.tool_call_id} | _named(self.name)


class FunctionMessage(Replayed):
    """The same in the older form, which names the function in place of the call."""

    place: ClassVar[Place] = "message"
    role: Literal["function"]
    content: ToolContent | None = None
    name: Name

    @property
    def chars(self) -> int:
        """About how much text a template makes of it."""
        return len(_joined(self.content or ""))

    def plain(self) -> dict[str, Any]:
        """As templates want it: a tool's message."""
        content = _joined(self.content or "")
        return {"role": "tool", "content": content, "tool_call_id": _function_id(self.name), "name": self.name}


_TURNS = {"assistant": "<assistant>", "tool": "<tool>", "function": "<function>"}
_CALLERS = ("system", "developer", "user")


def _turn_kind(value: object) -> str | None:
    role = value.get("role", "user") if isinstance(value, dict) else getattr(value, "role", "user")
    return "<turn>" if role in _CALLERS or not isinstance(role, str) else _TURNS.get(role)


Message = Annotated[
    Annotated[Instruction, Tag("<turn>")]
    | Annotated[AssistantMessage, Tag("<assistant>")]
    | Annotated[ToolMessage, Tag("<tool>")]
    | Annotated[FunctionMessage, Tag("<function>")],
    Discriminator(
        _turn_kind,
        custom_error_type="role",
        custom_error_message=f"Input should be one of {', '.join(map(repr, (*_CALLERS, *_TURNS)))}",
    ),
]
Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]


def _named(name: str | None) -> dict[str, Any]:
    return {} if name is None else {"name": name}


def _joined(content: str | Sequence[TextPart | RefusalPart | ThinkingPart]) -> str:
    """Text of content, its parts joined by line ends; thinking is told apart."""
    if isinstance(content, str):
        return content
    return "\n".join(said for part in content if (said := part.said) is not None)


def _thoughts(parts: Iterable[TextPart | RefusalPart | ThinkingPart]) -> str:
    return "\n".join(part.thinking for part in parts if isinstance(part, ThinkingPart))


def _function_id(name: str) -> str:
    """The id of a call that came without one, the same for the call and its result."""
    return f"function_{name}"
