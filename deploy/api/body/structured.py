"""Structured output: the forms in which a request can ask for it, and their way to one grammar."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from divisi.deploy.api.body.base import Body
from divisi.deploy.api.errors import ApiError
from divisi.model.text.grammar.compiler import GrammarCompiler
from divisi.model.text.grammar.reader import GrammarError

MAX_CHOICES = 2**16
"""Bound of the schema; the grammar limits are the ones that people meet."""


class PlainText(Body):
    """No structure."""

    type: Literal["text"]


class JsonObject(Body):
    """Any JSON object."""

    type: Literal["json_object"]


class NamedSchema(Body):
    """A schema as OpenAI wraps it."""

    name: str = Field(min_length=1, max_length=256)
    description: str | None = Field(default=None, max_length=65536)
    schema_: dict[str, Any] | bool = Field(alias="schema")
    strict: bool | None = None
    """Taken with any value: a schema is always enforced."""


class JsonSchema(Body):
    """JSON of a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


def _format_kind(value: object) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return f"<{kind}>" if kind in ("text", "json_object", "json_schema") else None


ResponseFormat = Annotated[
    Annotated[PlainText, Tag("<text>")]
    | Annotated[JsonObject, Tag("<json_object>")]
    | Annotated[JsonSchema, Tag("<json_schema>")],
    Discriminator(
        _format_kind,
        custom_error_type="kind",
        custom_error_message="Input should be an object with a type of text, json_object or json_schema",
    ),
]


class StructuredOutputs(Body):
    """vLLM's form: exactly one of the fields."""

    json_: dict[str, Any] | bool | None = Field(default=None, alias="json")
    regex: str | None = Field(default=None, min_length=1)
    choice: Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)] | None = None
    grammar: str | None = Field(default=None, min_length=1)
    """In Lark's or GBNF's notation."""
    json_object: Literal[True] | None = None

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        given = [name for name in ("json_", "regex", "choice", "grammar", "json_object") if self._has(name)]
        if len(given) != 1:
            names = ", ".join(name.rstrip("_") for name in given) or "none"
            raise ValueError(f"give exactly one of json, regex, choice, grammar and json_object; got {names}")
        return self

    def _has(self, name: str) -> bool:
        return getattr(self, name) is not None


def content_grammar(
    compiler: GrammarCompiler, response_format: Any, structured: StructuredOutputs | None
) -> str | None:
    """The grammar that an answer must follow, None where it is free.

    Takes milliseconds, and seconds at the worst. Raises ApiError naming the field that asks for too much.
    """
    if structured is not None and not isinstance(response_format, (PlainText, type(None))):
        raise ApiError(
            "structured_outputs and response_format both ask for a structure; send one of them",
            param="structured_outputs",
        )
    try:
        if structured is not None:
            return _structured(compiler, structured)
        return _formatted(compiler, response_format)
    except GrammarError as error:
        field = "response_format" if structured is None else "structured_outputs"
        raise ApiError(f"{field}: {error}", param=field, code="invalid_grammar") from error


def _formatted(compiler: GrammarCompiler, wanted: Any) -> str | None:
    match wanted:
        case JsonObject():
            return compiler.json_object()
        case JsonSchema():
            return compiler.json_schema(wanted.json_schema.schema_)
        case _:
            return None


def _structured(compiler: GrammarCompiler, wanted: StructuredOutputs) -> str:
    if wanted.json_ is not None:
        return compiler.json_schema(wanted.json_)
    if wanted.regex is not None:
        return compiler.regex(wanted.regex)
    if wanted.choice is not None:
        return compiler.choice(wanted.choice)
    if wanted.grammar is not None:
        return compiler.text(wanted.grammar)
    return compiler.json_object()
