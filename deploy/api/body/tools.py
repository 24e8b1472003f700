"""Tools in a chat request: what may be offered, chosen and given back, and the calls that an answer may hold."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from divisi.deploy.api.body.base import Body, one_of
from divisi.deploy.api.body.replayed import Place, Replayed
from divisi.deploy.api.body.surrogates import mend_surrogates
from divisi.deploy.api.errors import ApiError
from divisi.model.text.grammar.answer import CallRule, OfferedTool
from divisi.model.text.grammar.compiler import GrammarCompiler
from divisi.model.text.grammar.reader import GrammarError
from divisi.model.text.json_scan import MAX_DEPTH

MAX_TOOLS = 128
MAX_TOOL_CHARS = 65_536
"""Longest JSON text of one function, description and parameters together."""
MAX_CALLS = 128
"""Calls in one assistant message."""
MAX_ARGUMENTS_CHARS = 2**20

FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
CallId = Annotated[str, Field(max_length=256)]


class FunctionSpec(Replayed):
    """A function on offer."""

    place: ClassVar[Place] = "tool"
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """JSON schema of the arguments, an object's."""
    strict: bool | None = None
    """Whether a grammar holds the arguments to the schema."""


class Tool(Replayed):
    """One entry of `tools`."""

    place: ClassVar[Place] = "tool"
    type: Literal["function"]
    function: FunctionSpec

    def plain(self) -> dict[str, Any]:
        """As templates show it; `strict` is no matter of the model's."""
        return {"type": "function", "function": self.function.model_dump(exclude_none=True, exclude={"strict"})}


class ChosenFunction(Body):
    """The name in a named choice."""

    name: FunctionName


class NamedChoice(Body):
    """The one function that must be called."""

    type: Literal["function"]
    function: ChosenFunction


def _choice_kind(value: object) -> str | None:
    return "<word>" if isinstance(value, str) else "<function>" if isinstance(value, (dict, NamedChoice)) else None


ToolChoice = Annotated[
    Annotated[Literal["auto", "none", "required"], Tag("<word>")] | Annotated[NamedChoice, Tag("<function>")],
    Discriminator(
        _choice_kind,
        custom_error_type="kind",
        custom_error_message='Input should be "auto", "none", "required" or {"type": "function", "function": {"name"}}',
    ),
]
Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)]


def _arguments_kind(value: object) -> str | None:
    return "<text>" if isinstance(value, str) else "<object>" if isinstance(value, dict) else None


class CalledFunction(Replayed):
    """The function part of a call given back. Its name is what a model wrote, on offer or not."""

    place: ClassVar[Place] = "call"
    name: str = Field(min_length=1, max_length=256)
    arguments: (
        Annotated[
            Annotated[str, Field(max_length=MAX_ARGUMENTS_CHARS), Tag("<text>")]
            | Annotated[dict[str, Any], Tag("<object>")],
            one_of(_arguments_kind, "the text of a JSON object"),
        ]
        | None
    ) = None
    """A JSON object as text. An answer that was cut left a piece of one."""

    @property
    def chars(self) -> int:
        """About how long the arguments are as text."""
        return len(self.arguments if isinstance(self.arguments, str) else str(self.arguments))

    def parsed(self) -> dict[str, Any] | str:
        """The arguments as templates want them: an object; what is none stays the text that it is."""
        if not isinstance(self.arguments, str):
            return self.arguments or {}
        text = mend_surrogates(self.arguments)
        try:
            arguments = json.loads(text) if text.strip() else {}
        except (ValueError, RecursionError):
            return text
        return arguments if isinstance(arguments, dict) else text


class AssistantCall(Replayed):
    """A call of an earlier answer, given back in the conversation."""

    place: ClassVar[Place] = "call"
    id: CallId
    type: Literal["function"] | None = "function"
    function: CalledFunction

    def plain(self) -> dict[str, Any]:
        """As templates want it."""
        function = {"name": self.function.name, "arguments": self.function.parsed()}
        return {"id": self.id, "type": "function", "function": function}


AssistantCalls = Annotated[list[AssistantCall], Field(max_length=MAX_CALLS, fail_fast=True)]


def offered(tools: Sequence[Tool] | None, choice: str | NamedChoice | None) -> tuple[Tool, ...]:
    """The tools that the model may know of. Raises ApiError for a choice that isn't among them, and for bad tools."""
    tools = tuple(tools or ())
    if not tools:
        if choice not in (None, "none", "auto"):
            raise ApiError("tool_choice: there are no tools to choose from; send tools", param="tool_choice")
        return ()
    _check_tools(tools)
    if isinstance(choice, NamedChoice) and choice.function.name not in {tool.function.name for tool in tools}:
        raise ApiError(
            f"tool_choice: there is no tool {choice.function.name!r}; name one of tools", param="tool_choice"
        )
    return () if choice == "none" else tools


def is_forced(choice: str | NamedChoice | None) -> bool:
    """Whether the answer can be nothing but calls."""
    return choice == "required" or isinstance(choice, NamedChoice)


def call_rule(
    compiler: GrammarCompiler, tools: Sequence[Tool], choice: str | NamedChoice | None, *, parallel: bool
) -> CallRule | None:
    """What a grammar must hold the calls to; None where they are free.

    A forced call always has a grammar; its arguments follow the schema where that can be enforced. Elsewhere only
    strict tools do. Raises ApiError for a strict tool whose schema has what no grammar can enforce. May take tens of
    milliseconds for large schemas.
    """
    if not tools:
        return None
    if isinstance(choice, NamedChoice):
        tools = [tool for tool in tools if tool.function.name == choice.function.name]
    forced = is_forced(choice)
    if not forced and not any(tool.function.strict for tool in tools):
        return None
    return CallRule(tuple(_enforced(compiler, tool, forced=forced) for tool in tools), forced, single=not parallel)


def _enforced(compiler: GrammarCompiler, tool: Tool, *, forced: bool) -> OfferedTool:
    function = tool.function
    if function.parameters is None or not (function.strict or forced):
        return OfferedTool(function.name)
    try:
        compiler.json_schema(function.parameters)
        held = compiler.enforceable(function.parameters).schema
    except GrammarError as error:
        if not function.strict:
            return OfferedTool(function.name)
        raise ApiError(
            f"tools: the parameters of {function.name!r} cannot be enforced: {error}; "
            "simplify them, or leave strict out",
            param="tools",
        ) from error
    return OfferedTool(function.name, held if isinstance(held, dict) else None)


def _check_tools(tools: Sequence[Tool]) -> None:
    seen: set[str] = set()
    for index, tool in enumerate(tools):
        name = tool.function.name
        if name in seen:
            raise ApiError(f"tools[{index}]: a second function {name!r}; give each its own name", param="tools")
        seen.add(name)
        _check_parameters(tool.function, f"tools[{index}].function")


def _check_parameters(function: FunctionSpec, where: str) -> None:
    chars = len(function.description or "") + len(json.dumps(function.parameters))
    if chars > MAX_TOOL_CHARS:
        raise ApiError(
            f"{where}: description and parameters have {chars} characters, at most {MAX_TOOL_CHARS} are taken; "
            "shorten them",
            param="tools",
        )
    schema = function.parameters
    if not schema:
        return
    if _depth(schema) > MAX_DEPTH:
        raise ApiError(f"{where}.parameters: nested deeper than {MAX_DEPTH}; flatten the schema", param="tools")
    if schema.get("type", "object") != "object":
        raise ApiError(
            f"{where}.parameters: arguments are an object, so its type must be 'object', got {schema['type']!r:.64}",
            param="tools",
        )
    if not isinstance(schema.get("properties", {}), dict):
        raise ApiError(f"{where}.parameters.properties: must be an object of JSON schemas", param="tools")


def _depth(value: object) -> int:
    """Levels of nesting; stops counting past the bound, level by level, so that no depth can overflow the stack."""
    level: list[object] = [value]
    depth = 0
    while level and depth <= MAX_DEPTH:
        groups = [item.values() if isinstance(item, dict) else item for item in level if isinstance(item, (dict, list))]
        level = [child for group in groups for child in group]
        depth += 1
    return depth
